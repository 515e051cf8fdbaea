"""What the optimizers share whose low-rank part is in the layers of a model: a group holds the parts of one layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lowrank_optim.optim.engine import LowRankOptimizer
from lowrank_optim.optim.options import one_of
from lowrank_optim.optim.parts import Group, Number, Option, Parts, Slots, View
from lowrank_optim.optim.views import is_sharded

# Switches of the common loop that have one setting here: a sample or a retraction is made on the host.
FIXED: dict[str, Any] = {"moments": "keep", "stagger": False, "capturable": False}


class LayerOptimizer(LowRankOptimizer):
    """No parameter is compressed; one in a group with a ``rank`` belongs to a layer and counts its ``updates``.

    Unlike ``step``, these count skipped updates too, so that the parts of a layer cannot come apart.
    """

    # What a layer is called and which function makes its groups, for messages.
    layer: ClassVar[str]
    maker: ClassVar[str]
    options = {name: Option(one_of(value), value) for name, value in FIXED.items()}

    def _warn_if_nothing_is_compressed(self) -> None:
        if all(group["rank"] is None for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__}: no {self.layer} among the parameters, all get the full-rank rule; "
                f"pass {self.maker}(model)",
                stacklevel=4,
            )

    def _slots(self, param: Tensor, group: Group, view: View, parts: Parts) -> Slots:
        slots = super()._slots(param, group, view, parts)
        return slots if group["rank"] is None else {**slots, "updates": Number(0)}

    def is_layer(self, params: list[Tensor], rank: int) -> bool:
        """Whether parameters are the parts of one layer of this rank."""
        raise NotImplementedError

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["rank"] is not None and any(is_sharded(p) for p in group["params"]):
            raise ValueError(
                f"Invalid params: the layers of {type(self).__name__} are split over processes, and its steps need "
                "them whole; train them with DistributedDataParallel, or leave them out of fully_shard "
                "(ignored_params)"
            )
        if group["rank"] is not None and not self.is_layer(group["params"], group["rank"]):
            raise ValueError(
                f"Invalid rank: {group['rank']}, expected None: the rank of {type(self).__name__} belongs to the "
                f"layers; make groups with {self.maker}(model)"
            )


def layer_groups(
    named: Mapping[str, Tensor], ranks: Mapping[tuple[str, ...], int], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A group for every layer that has something to train, and one of all other parameters that are trained.

    Args:
        named: parameters by name.
        ranks: of every layer, by the names of its parameters.
        options: hyper-parameters of the layers' groups.
    """
    groups: list[dict[str, Any]] = []
    for names, rank in ranks.items():
        params = [named[name] for name in names]
        if any(p.requires_grad for p in params):
            groups.append({"params": params, "param_names": [*names], **options, "rank": rank})
    taken = {id(named[name]) for names in ranks for name in names}
    rest = {name: p for name, p in named.items() if p.requires_grad and id(p) not in taken}
    if rest:
        groups.append({"params": [*rest.values()], "param_names": [*rest], "rank": None})
    return groups
