"""Every parameterization under every optimizer, in bf16 and under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_optim import GaLoreAdamW
from lowrank_optim.nn import convert
from lowrank_optim.optim.engine import LowRankOptimizer
from tests.conformance import nightly
from tests.nn.parameterizations import VARIANTS, Block, block, loss_of, train
from tests.optimizers import OPTIMIZERS, WITHOUT_RANK

every_variant = pytest.mark.parametrize("name", VARIANTS)
MICRO_BATCHES = 2


def adamw8bit(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    # So that the moments of these small layers are quantized too.
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit([p for _, p in params], min_8bit_size=16, **kwargs)
    return made


def adamw(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in params], **kwargs)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {**OPTIMIZERS, "AdamW": adamw, "AdamW8bit": adamw8bit}
BASES = [name for name in VARIANTS if "-" not in name]
# Every parameterization with one optimizer, and every optimizer with one parameterization.
PAIRS = [
    case
    for name in BASES
    for optimizer in MAKERS
    for case in ([(name, optimizer)] if name == BASES[0] or optimizer == "GaLoreAdamW" else nightly((name, optimizer)))
]


def fits(name: str, optimizer: str) -> bool:
    """Whether an optimizer of layers has something to act on."""
    nonlinear = getattr(VARIANTS[name].options, "act", "none") != "none"
    return {"SSTAdamW": name == "SST", "LOROAdamW": name != "SST" and not nonlinear}.get(optimizer, True)


def make(optimizer: str, params: Any) -> torch.optim.Optimizer:
    args: dict[str, Any] = {"update_proj_gap": 3} if optimizer in OPTIMIZERS else {}
    if optimizer in OPTIMIZERS and optimizer not in WITHOUT_RANK:
        args["rank"] = 2
    return MAKERS[optimizer](params, lr=1e-2, **args)


def in_backward(model: Block, optimizer: str) -> Callable[[int], None]:
    """Updates each parameter and frees its gradient as soon as the last micro-batch has added to it.

    Returns:
        What says before a backward pass which micro-batch it is.
    """
    turn = 0
    step_of: dict[Tensor, Callable[[], object]] = {}
    whole = make(optimizer, model.named_parameters())
    for group in whole.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            if isinstance(whole, LowRankOptimizer):
                step_of[p] = partial(whole.step_param, p, group)
            else:
                # The others know whole steps only.
                step_of[p] = make(optimizer, [("", p)]).step

    def hook(p: Tensor) -> None:
        if turn == MICRO_BATCHES - 1:
            step_of[p]()
            p.grad = None

    for p in step_of:
        p.register_post_accumulate_grad_hook(hook)

    def tell(micro_batch: int) -> None:
        nonlocal turn
        turn = micro_batch

    return tell


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_accumulated_updates_in_backward_equal_a_step_at_the_end(name: str, optimizer: str) -> None:
    if not fits(name, optimizer):
        pytest.skip("nothing to act on")
    at_end, hooked = block(), block()
    for model in (at_end, hooked):
        convert(model, VARIANTS[name].options)
    step = make(optimizer, at_end.named_parameters())
    tell = in_backward(hooked, optimizer)
    losses = []
    for update in range(4):
        batches = range(MICRO_BATCHES * update, MICRO_BATCHES * (update + 1))
        for micro_batch, batch in enumerate(batches):
            loss = loss_of(at_end, batch) / MICRO_BATCHES
            loss.backward()
            losses.append(loss.item())
            tell(micro_batch)
            (loss_of(hooked, batch) / MICRO_BATCHES).backward()
        assert all(p.grad is None for p in hooked.parameters())
        step.step()
        step.zero_grad()
    # Four updates along a sketch of rank 1 may lead anywhere.
    assert optimizer == "APOLLOMini" or sum(losses[-4:]) < sum(losses[:4])
    for (key, p), q in zip(at_end.named_parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p, q), key


@every_variant
def test_galore_compresses_the_factors(name: str) -> None:
    model = block()
    convert(model, VARIANTS[name].options)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = GaLoreAdamW(trained, lr=1e-2, rank=2, update_proj_gap=5, scale=1.0)
    # The factors, whose smaller side is their rank 4, a weight that is trained beside them, and no vector.
    compressed = [row.name for row in optimizer.explain() if row.method == "rank 2"]
    matrices = [n for n, p in trained if p.ndim == 2 and min(p.shape) > 2 and n.startswith("attn.q_proj.")]
    assert [n for n in compressed if n.startswith("attn.q_proj.")] == matrices and len(matrices) >= 2
    assert all(model.get_parameter(n).ndim == 2 for n in compressed)
    losses = train(model, optimizer, 0, 30)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@every_variant
def test_integer_buffers_keep_their_dtype_in_bf16(name: str) -> None:
    model = block()
    convert(model, VARIANTS[name].options)
    before = {key: value.dtype for key, value in model.state_dict().items() if not value.is_floating_point()}
    model.to(torch.bfloat16)
    after = {key: value.dtype for key, value in model.state_dict().items() if not value.is_floating_point()}
    assert after == before
    assert torch.int64 not in after.values()
    first, *_, last = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0, 10)
    assert last < first


@every_variant
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    layer = VARIANTS[name].options.build(24, 37, bias=True)
    x = torch.randn(5, 24, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    direct = torch.autograd.grad(layer(x).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))
