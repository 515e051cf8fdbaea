"""The convergence benchmark leaves out what exists, follows its ladders, stops at its budget, and fills its pages."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import claims, common, converge, converge_gpu, converge_table, front_table, table
from benchmarks.converge import Tokens
from benchmarks.converge_runs import CPU, Run, Suite
from benchmarks.methods import MAIN, METHODS, OTHERS, PILOTS
from lowrank_optim.pretrain import launch
from tests.pretrain.conftest import documents, write_shard

TOKENS = Tokens(np.zeros(1, np.uint16), np.zeros(1, np.uint16), "none")
TINY = CPU._replace(
    name="tiny",
    shape={**CPU.shape, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64},
    seq_len=8,
    batch_size=2,
    updates=3,
    rank=4,
    gap=2,
    evaluated=32,
)
WANTED = ["AdamW", "8-bit AdamW"]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Run]]:
    """Results in an empty folder, and runs that only write a loss, lowest at four times the first rate."""
    runs: list[Run] = []

    def train(suite: Suite, run: Run, tokens: Tokens) -> dict[str, Any]:
        runs.append(run)
        return {"loss": 3 + abs(math.log2(run.lr / 2e-2)) + abs(math.log2(run.rest / 1e-2)), "cpu_seconds": 1.0}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "versions", dict)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(converge, "train", train)
    monkeypatch.setattr(converge, "load_tokens", lambda suite, data: TOKENS)
    yield runs


def compete(seeds: list[int], budget: float = math.inf) -> None:
    converge.compete(TINY, seeds, WANTED, Path("data"), budget)


def test_runs_follow_the_ladders_and_are_made_once(made: list[Run]) -> None:
    compete([0])
    assert [run.method for run in made[: len(PILOTS)]] == [*PILOTS]
    assert {run.rest for run in made[len(PILOTS) :]} == {1e-2}
    by_name = {name: [run.lr for run in made if run.method.name == name] for name in WANTED}
    # The pilot with the best rate is AdamW's first run; the second method starts where AdamW ended.
    assert sorted(by_name["AdamW"]) == [2.5e-3, 1e-2, 2e-2, 4e-2]
    assert by_name["8-bit AdamW"][0] == 2e-2 and sorted(by_name["8-bit AdamW"]) == [1e-2, 2e-2, 4e-2]
    count = len(made)
    compete([0])
    assert len(made) == count
    compete([0, 1])
    assert [(run.method.name, run.lr, run.seed) for run in made[count:]] == [(name, 2e-2, 1) for name in WANTED]
    # A file of other settings is not one of these runs.
    path = converge.folder(TINY) / made[-1].file
    path.write_text(json.dumps({**json.loads(path.read_text()), "config_hash": "another"}))
    compete([0, 1])
    assert made[-1] == made[-2] and len(made) == count + 3


def test_the_budget_ends_between_runs(made: list[Run]) -> None:
    compete([0], budget=0.0)
    assert not made


def test_what_another_process_runs_is_left_to_it(made: list[Run]) -> None:
    (first, *_) = converge.pending([0], {})
    with converge.claimed(TINY, first) as mine:
        assert mine
        compete([0])
    assert first not in made and len(made) == len(PILOTS) - 1


def test_every_method_has_one_start() -> None:
    for method in METHODS.values():
        assert (method.start is None) != (method.follows is None), method.name
        assert method.follows is None or method.follows in {one.name for one in MAIN}
    assert {*front_table.TRAINED.values(), front_table.CONTROL} <= METHODS.keys()
    files = {Run(method, 1e-3, 0, 1e-2).file for method in METHODS.values()}
    assert len(files) == len(METHODS)


def trained(name: str) -> dict[str, Any]:
    pytest.importorskip("transformers")
    ids = np.random.default_rng(0).integers(0, 64, 64).astype(np.uint16)
    return converge.train(TINY, Run(METHODS[name], 1e-2, 0, 2e-2), Tokens(ids, ids[:32], "random"))


def test_contestants_start_alike_and_count_their_bytes() -> None:
    adamw, galore = trained("AdamW"), trained("GaLore")
    # The losses before the first update has an effect.
    assert adamw["curve"][0]["train_loss"] == galore["curve"][0]["train_loss"]
    assert adamw["loss"] != galore["loss"]
    weights = converge_table.dense_weights(TINY)
    assert adamw["bytes"]["hidden_weights"] == 4 * weights
    # Two moments, and a step for each of seven matrices.
    assert adamw["bytes"]["hidden_state"] == 8 * weights + 7 * 4
    assert galore["bytes"]["hidden_state"] < adamw["bytes"]["hidden_state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [method.name for method in (*MAIN, *OTHERS)])
def test_every_method_trains(name: str) -> None:
    assert math.isfinite(trained(name)["loss"])


def test_a_published_run_goes_on_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(common, "versions", dict)
    pieces: list[Any] = []

    def piece(options: Any) -> int:
        pieces.append(options)
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        made = {"step": len(pieces), "peak_memory_bytes": 7, "tokens_per_second": 5.0}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(
                json.dumps(made) + "\n" + json.dumps({"step": len(pieces), "eval_loss": 9.0 - len(pieces)}) + "\n"
            )
        return converge_gpu.PAUSED if len(pieces) < 3 else 0

    monkeypatch.setattr(converge_gpu.train, "run", piece)
    suite = converge_gpu.Suite(updates=3)
    for _ in range(2):
        converge_gpu.compete(suite, [0], ["GaLore"], tmp_path / "text", math.inf)
    assert len(pieces) == 3 and len({one.output_dir for one in pieces}) == 1
    assert all(one.resume == "auto" and one.max_time == 4.0 for one in pieces)
    row = json.loads((tmp_path / "converge" / "gpu" / "galore_seed0.json").read_text())
    assert row["loss"] == 6.0 and len(row["curve"]) == 3 and row["peak_memory_bytes"] == 7


@pytest.mark.slow
def test_a_published_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    write_shard(tmp_path / "text" / "train.json.gz", documents(60, 0))
    write_shard(tmp_path / "text" / "validation.json.gz", documents(10, 1))
    config = tmp_path / "small.json"
    fields = {"hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 64, **fields}))
    # Every piece ends after an update or two.
    looks: Counter[launch.Stop] = Counter()
    monkeypatch.setattr(launch.Stop, "is_late", lambda self, now: looks.update([self]) or looks[self] > 20)
    suite = converge_gpu.Suite(str(config), "fp32", updates=6, batch_size=2, seq_len=16)
    converge_gpu.compete(suite, [0], ["GaLore"], tmp_path / "text", math.inf)
    row = json.loads((tmp_path / "converge" / "gpu" / "galore_seed0.json").read_text())
    assert row["curve"][-1]["update"] == 6 and math.isfinite(row["loss"])


def test_a_verdict_follows_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, perplexity: float) -> converge_table.Row:
        loss = math.log(perplexity)
        return converge_table.Row(name, loss, {0: loss}, 1e-3, 3, True, 12.0, ((400_000, loss),))

    found = {name: row(name, value) for name, value in (("A", 50.0), ("B", 55.0), ("C", 50.1))}
    monkeypatch.setattr(claims, "converged", lambda suite: found)
    verdicts = [claims.better(*names)() for names in (("A", "B"), ("B", "A"), ("A", "C"), ("A", "absent"))]
    assert [one and one.verdict for one in verdicts] == [
        "reproduced (1 seed, 0.4 M tokens)", "not reproduced (1 seed, 0.4 M tokens)",
        "not reproduced (1 seed, 0.4 M tokens)", None,
    ]  # fmt: skip
    assert claims.as_good("B", "A", 0.11)().verdict.startswith("reproduced")  # type: ignore[union-attr]
    assert claims.as_good("B", "A", 0.09)().verdict.startswith("not reproduced")  # type: ignore[union-attr]
    found |= {name: row._replace(seeds=dict.fromkeys(range(3), row.loss)) for name, row in found.items()}
    assert claims.better("B", "A")().verdict == "contradicted (3 seeds, 0.4 M tokens)"  # type: ignore[union-attr]


def test_claims_name_methods_that_exist() -> None:
    for claim in claims.CLAIMS:
        cells = claim.ours.__closure__ or ()
        names = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, str)]
        if claim.command == converge_table.COMMAND and len(names) == 2:
            assert set(names) <= METHODS.keys(), claim


def test_pages_and_plots_show_the_runs_that_exist() -> None:
    readme = table.README.read_text(encoding="utf-8")
    assert table.replaced(readme, front_table.current(), front_table.BEGIN) == readme
    page = converge_table.PAGE.read_text(encoding="utf-8")
    assert table.replaced(page, converge_table.choosing(), converge_table.CHOOSING) == page
    assert not converge_table.stale_plots()
    listed = claims.PAGE.read_text(encoding="utf-8")
    assert table.replaced(listed, claims.current(), claims.BEGIN) == listed
