"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, state_bytes, step
from benchmarks.baselines import ARGUMENTS, VARIANTS, candidates, every_svd_once, own_names
from benchmarks.budgets import Budget, budgets
from tests.optimizers import OPTIMIZERS
from tests.pretrain.conftest import documents, write_shard


@pytest.fixture(autouse=True)
def _results_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_public_optimizer_is_a_contestant() -> None:
    names = {one.name for one in candidates()}
    assert set(own_names()) <= names
    assert set(own_names()) <= set(OPTIMIZERS)


@pytest.mark.slow
def test_every_public_optimizer_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    only = [*own_names(), "torch AdamW"]
    step.main(["--models", "llama_9m", "--budget", "0", "--threads", "1", "--only", *only])
    figures = json.loads((tmp_path / "step.json").read_text())["models"]["llama_9m"]
    # The published packages are optional; nothing of ours may be left out.
    assert not set(own_names()) & set(figures["left_out"])
    methods = figures["methods"]
    assert set(own_names()) <= set(methods) <= {one.name for one in candidates()}
    assert all(row["seconds"]["median"] > 0 and row["to_floor"] > 0 for row in methods.values())
    assert methods["GaLoreAdamW"]["full_size_temporaries"] == 0
    assert methods["torch AdamW foreach"]["full_size_temporaries"] >= 1
    # Moments (rows + columns, both sides of the projection) and bases of 4 layers, rank 32, fp32.
    low = 4 * 4 * (4 * (2 * 128 * 32 + 128 * 32) + 3 * (2 * 352 * 32 + 128 * 32))
    assert methods["GaLoreAdamW"]["state_bytes"] == low
    assert methods["torch AdamW fused"]["state_bytes"] >= 2 * figures["weight_bytes"]
    for row in (methods["GaLoreAdamW"], methods["torch AdamW fused"]):
        a_parameter = row["state_bytes"] / (figures["weight_bytes"] / 4)
        assert row["state_bytes_a_parameter"]["float32"] == pytest.approx(a_parameter)
    assert set(figures["refresh"]) == {"svd", "randomized", "power"}
    refreshed = figures["stagger"]["refreshed_parameters"]
    assert refreshed["slowest"] >= refreshed["median"]
    held = {budget.name: budget for budget in budgets(figures)}
    assert held["GaLoreAdamW / two GEMMs"].measured == methods["GaLoreAdamW"]["to_floor"]
    assert held["full-size tensors a matrix: GaLore"].met


def test_planned_bytes_a_parameter() -> None:
    shapes = [torch.Size((256, 128)), torch.Size((128, 256))]
    names = ("GaLoreAdamW", "SinkGD", "Muon")
    found = {name: state_bytes.planned(name, {}, shapes, 32, torch.float32) for name in names}
    assert state_bytes.cell(found["SinkGD"]) == "0.00"
    # Two moments (256, 32) and a basis (128, 32) of 256 x 128 values.
    assert found["GaLoreAdamW"] == {"float32": 2.5, "bfloat16": 1.5, "int8": 0.5 + 2 * (1 + 4 / 256) * 32 / 128}
    assert state_bytes.cell(found["Muon"]) == "4.00 / 2.00 / 1.02"
    assert state_bytes.cell(None) == "–"


def test_a_budget_says_whether_it_is_met_and_what_two_gemms_would_measure() -> None:
    assert Budget("a", 1.2, 1.2).met and not Budget("a", 1.21, 1.2).met
    assert Budget("a", 20.0, 20.0, least=True).met and not Budget("a", 19.9, 20.0, least=True).met
    assert Budget("a / b", 0.5, 0.45, two_gemms=0.449).line().endswith("0.50 <= 0.45 MISSED, two GEMMs alone 0.45")


def test_who_cannot_run_is_named_with_the_reason() -> None:
    def absent(params: Any, rank: int) -> Any:
        raise ImportError("No module named 'galore_torch'")

    work = step.problem("llama_9m", 8, torch.device("cpu"), torch.float32)
    missing = step.Candidate("peer", absent, {})
    running, left_out = step.start(work, [missing])
    assert running == [] and left_out == {"peer": "ImportError: No module named 'galore_torch'"}


def test_who_writes_into_the_gradients_stops_the_run() -> None:
    class Vandal(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.grad.zero_()

    work = step.problem("llama_9m", 8, torch.device("cpu"), torch.float32)
    vandal = step.Candidate("vandal", lambda params, rank: Vandal(params), {})
    with pytest.raises(RuntimeError, match="vandal wrote into the gradients"):
        step.start(work, [vandal])


def test_an_svd_is_computed_once_with_the_strides_of_the_first() -> None:
    a = torch.randn(6, 4)
    expected = torch.linalg.svd(a, full_matrices=False)
    with every_svd_once({}):
        first = torch.linalg.svd(a, full_matrices=False)
        first[0].zero_()
        again = torch.linalg.svd(a.clone(), full_matrices=False)
        other = torch.linalg.svd(a + 1, full_matrices=False)
    assert [x.stride() for x in again] == [x.stride() for x in expected]
    assert all(torch.equal(x, y) for x, y in zip(again, expected))
    assert not torch.equal(other[1], expected[1])


def test_arguments_name_existing_classes_once_they_are_public() -> None:
    planned = {"GaLoreAdafactor", "DCTAdamW", "Trion", "APOLLOMini", "FiraAdamW"}
    assert {*ARGUMENTS, *(name for name, _ in VARIANTS)} <= planned | set(own_names())


def test_energy_of_a_refresh_on_recorded_gradients(tmp_path: Path) -> None:
    for package in ("transformers", "tokenizers", "datasets"):
        pytest.importorskip(package)
    from benchmarks import refresh_energy

    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "c4-train.00000-of-00001.json.gz", documents(60, 0))
    config = tmp_path / "small.json"
    fields = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64, **fields}))
    line = f"--model {config} --dataset {shards} --steps 7 --gap 3 --rank 8 --batch-size 4 --seq-len 24 --threads 1"
    refresh_energy.main([*line.split(), "--budget", "0"])
    result = json.loads((tmp_path / "refresh_energy.json").read_text())
    assert result["run"]["dataset"] == "shards" and result["run"]["rank"] == 8
    assert [row["step"] for row in result["refreshes"]] == [4, 7]
    for row in result["refreshes"]:
        assert 0 < row["captured_by_svd"] <= 1
        # Nothing captures more than the exact singular vectors, and a refresh more than none.
        assert row["stale"]["mean"] < row["power"]["mean"] <= 1 + 1e-6
        assert 0.9 < row["randomized"]["worst"] <= 1 + 1e-6
    assert result["times"]["power"]["svd_to_this"] > 0
