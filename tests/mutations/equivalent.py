"""Faults that change no result, or none that a machine without a GPU could see, each with its reason."""

from __future__ import annotations

import re

from tests.mutations.sites import Site

# A regular expression for the name of the fault, and why it does not count.
REASONS: tuple[tuple[str, str], ...] = (
    (r"ops/row_norms.py:row_norms: matrix.device", "a faster way to the same norms"),
    (r"ops/sltrain.py:_(weight|sddmm): .*is_cuda -> True", "the same by the operator that a compiler sees"),
    (r"ops/chunks.py:as_batch: tensor.ndim == [23] -> False", "a view of the same shape"),
    (r"ops/project.py:project: grad.dtype == wide -> False", "a product in parts"),
    (r"ops/project.py:project: grad.ndim == 2 -> False #1", "a product by way of a temporary"),
    (r"state_storage.py:slices: numel <= SLICE or .* -> \(not all", "one slice of all"),
    (
        r"(square_of|adam_direction): (low|grad).is_complex\(\) -> True",
        "|x|² of real numbers, by way of their conjugate",
    ),
    (r"ops/blockwise.py:search_tables: device not in", "tables made anew"),
    (r"plans.py:.*_plan: self._checked.get\(id\(group\)\) != key -> True", "a check that is made again"),
    (r"lowrank_update.py:move_: isinstance.* or isinstance.* -> True", "decay in a pass of its own"),
    (r"lowrank_update.py:_add_gradient_: not masks and len\(scales\) == 1 and .* -> False", "the same in parts"),
    (r"lowrank_update.py:move_: len\(value\) == 1 -> False", "the batched product of one matrix"),
    (r"engine.py:.*refresh_seconds", "a measured time"),
    (r"engine.py:LowRankOptimizer.refresh: layout is not None and .* -> False", "the whole gradient is gathered"),
    (r"sharding.py:Layout.unwrap: isinstance\(value, Tensor\)", "numbers have no axis to be cut along"),
    (r"fixed_basis.py:Columns.project_back_: .* -> False", "a product with the identity"),
    (r"error_feedback.py:ErrorFeedback: True -> False #1", "a low-rank copy more"),
    (r"scale.py:RowNormalisedMomentum: True -> False", "it tells refreshes, which there are none of"),
    (r"schema.py:checked: isinstance\(correction, Slot\) and", "no number has this name"),
    (r"adam.py:Adam._kernel: AXIS in state and .* -> \(isinstance", "a call of the host more"),
    (r"lowrank_update.py:lowrank_update_: in_place and weight.ndim == 2 -> False", "by way of a batch of one"),
    (
        r"state_storage.py:recoded: not suffix and isinstance\(slot, Slot\) and .* -> \(not suffix\) and \(holds",
        "for types",
    ),
    (r"spectral_linear.py:_through_parts: r < s.numel\(\) and .* -> \(need", "products with nothing"),
    (r"sltrain.py:sltrain_gradients: x.shape\[0\] \* .* -> (True|False)", "another order of the same products"),
    (r"int8_weight.py:round_groups_: step.clamp_min_", "the NaN of a group of zeros is 0 as an integer"),
    (r"whole.py:Unprojected.project: torch.promote_types", "it holds no value"),
    (r"sharding.py:Layout.wrap: suffix == \"codes\" -> True", "wrapped twice"),
    (r"fixed_basis.py:add_coefficients_: out.dtype == tall.dtype -> False", "the same in parts"),
    (r"whole.py:Unprojected: False -> True #1", "nothing of it is refreshed"),
    (r"alice.py:TrackingAdam: False -> True$", "its lift asks for zeros, too"),
    (r"in_backward.py:StepInBackward._clip_: grad.is_complex\(\) -> False", "a complex gradient has the same length"),
    (r"spectral_linear.py:_through_parts: .* -> \(r < s.numel\(\)\)$", "products that nobody reads"),
    (r"random.py:(pick_columns|add_to_columns_): indices.ndim == 1 -> False", "the same elements by their places"),
)


def reason_of(site: Site) -> str | None:
    """Why a fault is left out; None where it counts."""
    return next((reason for pattern, reason in REASONS if re.search(pattern, site.name)), None)
