"""Parameterized models in the memory estimate: parameter counts to the unit, bytes against real tensors."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from lowrank_optim.memory.cli import main
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.llama import PRESETS
from lowrank_optim.pretrain.sizes import tensor_bytes

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
SIZES = ("llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b")


def count(size: str, rank: int | None = None, density: float = 0.0) -> int:
    """Trained values by hand: dense embedding, head and norms, and a matrix r (m + n) + floor(density m n) or m n."""
    shape = PRESETS[size]
    d, f = shape.hidden, shape.intermediate
    matrices = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]
    layer = sum(rank * (m + n) + int(density * m * n) if rank else m * n for m, n in matrices) + 2 * d
    return 2 * shape.vocab * d + d + shape.layers * layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "rank", "density", "millions"),
    [
        ("llama_60m", 128, 0.03, (58.07, 42.77, 43.53)),
        ("llama_130m", 256, 0.03, (134.11, 94.00, 96.55)),
        ("llama_350m", 256, 0.03, (367.97, 185.22, 194.29)),
        pytest.param("llama_1b", 512, 0.03, (1339.08, 609.31, 645.55), marks=pytest.mark.slow),
        pytest.param("llama_7b", 1024, 0.05, (6738.42, 2820.94, 3144.74), marks=pytest.mark.slow),
    ],
)
def test_published_parameter_counts(size: str, rank: int, density: float, millions: tuple[float, float, float]) -> None:
    # No options given: they are those of the size.
    dense, low, sparse = (
        estimate(Job(model=size, optimizer="AdamW", parameterization=name)) for name in (None, "lowrank", "sltrain")
    )
    assert dense.parameters == count(size)
    assert low.parameters == count(size, rank)
    assert sparse.parameters == count(size, rank, density)
    assert tuple(round(found.parameters / 1e6, 2) for found in (dense, low, sparse)) == millions
    # At most 4 bytes an entry, where the published code has 8.
    entries = sparse.parameters - low.parameters
    assert 0 < sparse.index_bytes <= 4 * entries
    assert sparse.by_category["weights"] == 2 * sparse.parameters + sparse.index_bytes


# Weights and Adam's states of bf16 models in 10^9 bytes, from closed forms: r (m + n) values a matrix for LowRank,
# these and the frozen m n for LoRA, r (m + n) + k m for LOST with k = max(1, floor(0.01 n)), q (m + n) + q stored and
# r (m + n) + q trained values with r = hidden / 16 for SST. The states are bf16, those of our SSTAdamW fp32.
@pytest.mark.parametrize(
    ("name", "optimizer", "expected"),
    [
        ("lowrank", "AdamW", (0.257, 0.564, 1.111, 3.656, 16.93)),
        pytest.param("lora", "AdamW", (0.307, 0.734, 1.716, 6.072, 29.88), marks=pytest.mark.slow),
        pytest.param("lost", "AdamW", (0.258, 0.569, 1.129, 3.727, 17.31), marks=pytest.mark.slow),
        ("sst", "SSTAdamW", (0.428, 0.829, 1.854, 6.097, 28.22)),
    ],
)
def test_bytes_of_weights_and_states(name: str, optimizer: str, expected: tuple[float, ...]) -> None:
    for size, gigabytes in zip(SIZES, expected, strict=True):
        result = estimate(Job(model=size, optimizer=optimizer, parameterization=name))
        total = result.by_category["weights"] + result.by_category["optimizer"]
        # Half a unit of the last printed digit, and the step counters.
        assert total / 1e9 == pytest.approx(gigabytes, abs=6e-3 if gigabytes > 10 else 6e-4), size


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("sltrain", "AdamW"),
        ("sltrain", "GaLoreAdamW"),
        ("sltrain", "AdamW8bit"),
        ("lost", "AdamW"),
        ("lora", "AdamW"),
        ("relora", "AdamW"),
        ("cola", "AdamW"),
        ("sst", "SSTAdamW"),
        ("loro", "LOROAdamW"),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_equals_a_stepped_optimizer_to_the_byte(
    tmp_path: Any, name: str, optimizer: str, dtype: str
) -> None:
    if optimizer.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    layers, args = {"rank": 16}, {"rank": 8} if optimizer == "GaLoreAdamW" else {}
    job = Job(
        model=str(path), optimizer=optimizer, optimizer_args=args, dtype=dtype, parameterization=name,
        parameterization_args=layers,
    )  # fmt: skip
    predicted = estimate(job)
    _, _, model, built = build(job, "cpu")
    tokens = torch.randint(0, 128, (1, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    built.step()
    measured = tensor_bytes(model, built)
    assert predicted.by_category["weights"] == measured["weights"]
    assert predicted.by_category["gradients"] == measured["gradients"]
    assert dict(predicted.optimizer_by_key) == measured["optimizer"]


def test_the_sheet_names_the_parameterization_and_its_index(capsys: pytest.CaptureFixture[str]) -> None:
    line = "estimate --model llama_60m --optimizer AdamW --parameterization sltrain --parameterization-args rank=64"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama_60m as sltrain(rank=64, sparsity=0.03, alpha=32), AdamW(), bfloat16")
    assert re.search(r"^  of which index +[1-9]", out, re.MULTILINE)
    assert main([*line.split(), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameterization_args"] == {"rank": 64, "sparsity": 0.03, "alpha": 32}
    assert answer["index_bytes"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--parameterization sltrian", "did you mean sltrain"),
        ("--parameterization-args rank=4", "need --parameterization"),
        ("--parameterization lowrank --parameterization-args rank=4096", "Invalid rank: 4096, expected at most 128"),
    ],
)
def test_bad_input_is_one_line(more: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", "llama_9m", "--optimizer", "AdamW", *more.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
