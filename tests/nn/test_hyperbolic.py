"""The layer on the hyperboloid, with a dense and with a decomposed weight, and the example that uses it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lowrank_optim import SSTAdamW, spectral_groups
from lowrank_optim.nn import SST, SSTLinear, convert, merge
from lowrank_optim.nn.hyperbolic import LorentzLinear, lorentz_inner, on_hyperboloid, squared_lorentz_distance

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lorentz_tree.py"
WEIGHTS = pytest.mark.parametrize("weight", [None, SST(rank=2, std=0.3)], ids=["dense", "SST"])


def points(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return on_hyperboloid(torch.randn(*shape, dtype=dtype))


@WEIGHTS
def test_points_stay_on_the_hyperboloid(weight: SST | None) -> None:
    layer = LorentzLinear(5, 8, weight=weight, dtype=torch.float64)
    y = layer(points(3, 7, 4))
    assert y.shape == (3, 7, 8)
    torch.testing.assert_close(lorentz_inner(y, y), torch.full((3, 7), -1.0, dtype=torch.float64), rtol=0, atol=1e-10)
    low, high = 1.1, 1.1 + 10
    assert (y[..., 0] > low).all() and (y[..., 0] < high).all()


def test_the_layer_is_the_formula() -> None:
    layer = LorentzLinear(4, 3, scale=5.0, floor=1.2, dtype=torch.float64)
    x = points(6, 3)
    z = x @ layer.linear.weight.mT + layer.linear.bias
    t = 5 * torch.sigmoid(z[:, 0]) + 1.2
    y = layer(x)
    torch.testing.assert_close(y[:, 0], t)
    direction = z[:, 1:] / z[:, 1:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(y[:, 1:], direction * (t**2 - 1).sqrt()[:, None])


@WEIGHTS
def test_gradcheck(weight: SST | None) -> None:
    weight = None if weight is None else SST(rank=2, std=0.3, enhanced=False)
    layer = LorentzLinear(4, 5, weight=weight, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = points(3, 3).requires_grad_()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), (x,)), (x, *values)
    )


def test_a_zero_vector_has_a_finite_gradient() -> None:
    layer = LorentzLinear(3, 4)
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.bias.zero_()
    y = layer(points(2, 2, dtype=torch.float32))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_distance_is_that_of_the_geodesic() -> None:
    x, y = points(20, 3), points(20, 3)
    geodesic = torch.acosh(-lorentz_inner(x, y))
    torch.testing.assert_close(squared_lorentz_distance(x, y), 2 * torch.cosh(geodesic) - 2)
    torch.testing.assert_close(squared_lorentz_distance(x, x), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-9)


def test_its_weight_trains_as_sst_and_merges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LorentzLinear(6, 6, weight=SST(rank=2, std=0.4)), LorentzLinear(6, 6))
    convert(model, SST(rank=3), targets=r"1\.linear")
    assert sum(isinstance(module, SSTLinear) for module in model.modules()) == 2
    x, target = points(64, 5, dtype=torch.float32), points(64, 5, dtype=torch.float32)
    optimizer = SSTAdamW(spectral_groups(model), lr=0.02, update_proj_gap=5)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = squared_lorentz_distance(model(x), target).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    before = model(x)
    merge(model)
    assert not any(isinstance(module, SSTLinear) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="Invalid in_features: 1, expected an int of at least 2"):
        LorentzLinear(1, 4)
    with pytest.raises(ValueError, match=r"Invalid out_features: 2.5"):
        LorentzLinear(4, 2.5)
    with pytest.raises(ValueError, match=r"Invalid scale: 0\.0, expected a number above 0"):
        LorentzLinear(4, 4, scale=0.0)
    with pytest.raises(ValueError, match=r"Invalid floor: 0\.5, expected a number in \[1, inf\)"):
        LorentzLinear(4, 4, floor=0.5)
    with pytest.raises(ValueError, match="Invalid rank: 9, expected at most 4"):
        LorentzLinear(4, 6, weight=SST(rank=9))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lorentz_tree", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its classes look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_links_are_pairs_of_descendants_and_ancestors(example: ModuleType) -> None:
    links = example.make_links(60, example.np.random.default_rng(0))
    pairs = {tuple(pair) for pair in links.train.tolist()} | {tuple(pair) for pair in links.held_out.tolist()}
    assert len(pairs) == len(links.train) + len(links.held_out)
    assert all(ancestor < node and links.related[node, ancestor] for node, ancestor in pairs)
    # Both directions and the diagonal: nothing related is ever drawn as a wrong link.
    assert links.related.sum() == 2 * len(pairs) + 60
    partners = example.corrupt(links.held_out, 20, links, example.np.random.default_rng(1))
    assert not links.related[links.held_out[:, :1], partners].any()


@pytest.mark.slow
def test_the_hyperbolic_layer_beats_the_euclidean_one(example: ModuleType) -> None:
    scores = example.run(nodes=250, size=8, steps=150, seed=0, lr=0.03)
    assert scores["Lorentz"].auc > scores["Euclidean"].auc + 0.02
    assert scores["Lorentz, SST"].auc > scores["Euclidean"].auc + 0.02


def test_the_example_is_deterministic(example: ModuleType) -> None:
    first, second = (example.run(nodes=60, size=4, steps=25, seed=3, lr=0.03) for _ in range(2))
    assert first == second
