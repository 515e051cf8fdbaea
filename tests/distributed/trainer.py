"""The trainer on several processes: saved on some, continued on others, every parameterization, what it refuses.

    python -m tests.distributed.trainer FOLDER CASE...

runs cases of :data:`CASES` in processes that are forked from one, which saves their imports, and prints what each
measured as a line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Whatever else a run imports, it should be imported once.
import transformers.models.llama.modeling_llama  # noqa: F401
from lowrank_optim.cli.main import main
from lowrank_optim.pretrain import trainer
from lowrank_optim.pretrain.metrics import read_metrics
from tests.pretrain.conftest import documents, write_shard

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
# Eight sequences an update, however many processes share them.
LINE = (
    "--seq-len 24 --batch-size 2 --max-steps 8 --warmup-steps 1 --save-every 4 --keep 0 --eval-every 4 --eval-batches 3"
    " --sample-tokens 0 --loss-limit 0"
).split()
GALORE = "--optimizer-args rank=4 update_proj_gap=3".split()
SEQUENCES = 8


class Runs:
    """Runs of the trainer in a folder, on a small model and a small text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        data = folder / "data"
        data.mkdir(exist_ok=True)
        for number in range(3):
            write_shard(data / f"c4-train.{number:05}-of-00003.json.gz", documents(20, number))
        write_shard(data / "c4-validation.00000-of-00001.json.gz", documents(10, 99))
        self.common = ["--model", str(folder / "config.json"), "--dataset", str(data), *LINE]

    def run(self, name: str, world: int, *more: str, expected: int = 0) -> str:
        """Train in ``name`` on so many processes; returns what they printed."""
        line = [*self.common, "--output-dir", str(self.folder / name), *more]
        if "--accumulate" not in more:
            line += ["--accumulate", str(SEQUENCES // 2 // world)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [self.folder / f"{name}.{rank}.log" for rank in range(world)]
        started = [CONTEXT.Process(target=_enter, args=(rank, world, port, logs[rank], line)) for rank in range(world)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        said = "".join(log.read_text(encoding="utf-8") for log in logs)
        statuses = [process.exitcode for process in started]
        assert statuses == [expected] * world, f"{name}: {statuses}\n{said}"
        return said

    def continued(self, name: str, source: str, world: int, *more: str, step: int = 4) -> str:
        """Go on from a checkpoint of another folder."""
        return self.run(name, world, "--resume", str(self.folder / source / f"checkpoint-{step}"), *more)

    def losses(self, name: str, *, after: int = 0) -> list[float]:
        """Of every update and evaluation."""
        rows = read_metrics(self.folder / name / "metrics.jsonl")
        return [row.get("loss", row.get("eval_loss")) for row in rows if row["step"] > after]

    def weights(self, name: str, step: int = 8) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        path = self.folder / name / f"checkpoint-{step}"
        factored = path / "factored.safetensors"
        return load_file(factored if factored.exists() else path / "model.safetensors")

    def differ(self, name: str, other: str, *, after: int = 4) -> dict[str, float]:
        """The largest difference of losses, and of weights as a share of their largest value."""
        pairs = list(zip(self.losses(name, after=after), self.losses(other, after=after), strict=True))
        assert len(pairs) > 2
        ours, theirs = self.weights(name), self.weights(other)
        shares = [
            float((ours[key].double() - theirs[key].double()).abs().max() / theirs[key].double().abs().max())
            for key in theirs
        ]
        return {"loss": max(abs(a - b) for a, b in pairs), "weights": max(shares)}


CONTEXT = multiprocessing.get_context("fork")


def _enter(rank: int, world: int, port: int, log: Path, line: list[str]) -> None:
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(1)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        status = main(line)
        sys.stdout.flush()
        sys.stderr.flush()
        # What a process would clean up at its end was made before the fork.
        os._exit(status)


def elastic(runs: Runs, *more: str) -> dict[str, Any]:
    """Two processes with the options ``more``, saved in the middle and continued on one, two and four."""
    runs.run("two", 2, *GALORE, *more)
    found = {}
    for world in (1, 2, 4):
        # Four processes share eight sequences as two each.
        runs.continued(f"on{world}", "two", world, *GALORE, *more)
        found[str(world)] = runs.differ(f"on{world}", "two")
    return found


def there_and_back(runs: Runs) -> dict[str, Any]:
    """Either kind of checkpoint continued in the other way."""
    runs.run("two", 2, *GALORE, "--fsdp")
    runs.continued("copies", "two", 2, *GALORE)
    runs.run("one", 1, *GALORE)
    runs.continued("split", "one", 2, *GALORE, "--fsdp")
    return {"to copies": runs.differ("copies", "two"), "to shards": runs.differ("split", "one")}


CASES: dict[str, Callable[[Runs], Any]] = {
    "ddp": elastic,
    "fsdp": lambda runs: elastic(runs, "--fsdp"),
    "there and back": there_and_back,
}


if __name__ == "__main__":
    assert trainer
    for case in sys.argv[2:]:
        print(json.dumps({case: CASES[case](Runs(Path(sys.argv[1]) / case.replace(" ", "-")))}), flush=True)
