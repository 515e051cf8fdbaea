"""Forward and backward of one linear layer: dense, SLTrain as published, and SLTrain, LOST, SST, LowRank as here.

    python -m benchmarks.parameterizations [--device cuda] [--tokens 8192] [--budget 20]

Writes ``results/parameterizations_DEVICE.json``: for every shape the seconds of forward + backward in
interleaved rounds, their ratio to the dense layer, the peak memory above what existed before, and the bytes
that are held from the forward to the backward pass beside the input and the layer itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.common import interleave, ratio, spread, write_result
from benchmarks.memory_probe import peak_bytes
from lowrank_optim.nn import LOST, SST, LowRank, SLTrain, SLTrainLinear


class Shape(NamedTuple):
    """A layer of one of the published models, m x n, with the published rank."""

    name: str
    m: int
    n: int
    rank: int


SHAPES = {
    "cpu": [
        Shape("60M attention", 512, 512, 128),
        Shape("60M mlp.up", 1376, 512, 128),
        Shape("1B attention", 2048, 2048, 512),
    ],
    "cuda": [
        Shape("60M attention", 512, 512, 128),
        Shape("350M mlp.up", 2736, 1024, 256),
        Shape("1B attention", 2048, 2048, 512),
        Shape("1B mlp.up", 5461, 2048, 512),
        Shape("7B mlp.up", 11008, 4096, 1024),
    ],
}
TOKENS = {"cpu": 2048, "cuda": 8192}


class _Published(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, scaled_A: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, scaled_A, values, index)
        return x @ _dense(B, scaled_A, values, index).t()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, B, scaled_A, values, index = ctx.saved_tensors
        W = _dense(B, scaled_A, values, index)
        dx = grads[0] @ W
        G = grads[0].t() @ x
        return dx, G @ scaled_A.t(), B.t() @ G, G.view(-1).index_select(0, index), None


def _dense(B: Tensor, scaled_A: Tensor, values: Tensor, index: Tensor) -> Tensor:
    W = B @ scaled_A
    W.view(-1).index_add_(0, index, values)
    return W


class PublishedSLTrain(nn.Module):
    """The formulation of arXiv 2406.02214's code: W and a dense G rebuilt, a scaled copy of A saved, an int64 index."""

    def __init__(self, layer: SLTrainLinear) -> None:
        super().__init__()
        self.A, self.B, self.values, self.scale = layer.A, layer.B, layer.values, layer.scale
        self.register_buffer("index", layer.support().long())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Published.apply(x, self.B, self.scale * self.A, self.values, self.index)  # type: ignore[no-untyped-call]
        return y


def candidates(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers of one shape by name; the two SLTrain layers share their parameters."""
    made: dict[str, nn.Module] = {"dense": nn.Linear(shape.n, shape.m, bias=False, device=device, dtype=dtype)}
    sltrain = SLTrainLinear(shape.n, shape.m, SLTrain(shape.rank, 0.03, 32), device=device, dtype=dtype)
    # Not zero as at the start, so that every gradient is a general one.
    nn.init.normal_(sltrain.B, std=0.02)
    made["sltrain published"] = PublishedSLTrain(sltrain)
    made["sltrain"] = sltrain
    made["lost"] = LOST(shape.rank).build(shape.n, shape.m, device=device, dtype=dtype)
    # Published: a quarter of the rank of the others.
    made["sst"] = SST(shape.rank // 4).build(shape.n, shape.m, device=device, dtype=dtype)
    made["low rank"] = LowRank(shape.rank).build(shape.n, shape.m, device=device, dtype=dtype)
    return made


def step_of(layer: nn.Module, x: Tensor, direction: Tensor) -> Callable[[], None]:
    """Forward and backward; the gradients of a step are gone before the next."""

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(direction)

    return step


def held_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes saved for the backward pass beside the input, the parameters and the buffers."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(held.values())


def measure(shape: Shape, tokens: int, budget: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of one shape."""
    x = torch.randn(tokens, shape.n, device=device, dtype=dtype, requires_grad=True)
    direction = torch.randn(tokens, shape.m, device=device, dtype=dtype)
    layers = candidates(shape, device, dtype)
    steps = {name: step_of(layer, x, direction) for name, layer in layers.items()}
    seconds = interleave(steps, device, budget=budget, least=3)
    rows = {}
    for name, layer in layers.items():
        steps[name]()
        layer.zero_grad()
        x.grad = None
        rows[name] = {
            "seconds": spread(seconds[name]),
            "times_dense": ratio(seconds[name], seconds["dense"]),
            "peak_bytes": peak_bytes(steps[name], device),
            "held_bytes": held_bytes(layer, x),
            "layer_bytes": sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())),
        }
        layer.zero_grad()
    return {**shape._asdict(), "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "layers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="rows of the input; 2048 on the CPU, 8192 on a GPU")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing for a shape")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    shapes = []
    for shape in SHAPES[options.device]:
        found = measure(shape, options.tokens or TOKENS[options.device], options.budget, device, dtype)
        shapes.append(found)
        print(f"{shape.name}: {shape.m} x {shape.n}, rank {shape.rank}, {found['tokens']} tokens, {found['dtype']}")
        for name, row in found["layers"].items():
            mib = (f"{row[key] / 2**20:8.2f}" for key in ("peak_bytes", "held_bytes", "layer_bytes"))
            peak, held, layer = mib
            print(
                f"  {name:18} {row['seconds']['median'] * 1e3:9.1f} ms  {row['times_dense']:5.2f} x dense"
                f"   MiB: peak {peak}  held {held}  layer {layer}"
            )
    print(write_result(f"parameterizations_{options.device}", device, {"shapes": shapes}))


if __name__ == "__main__":
    main()
