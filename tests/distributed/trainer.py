"""The trainer on several processes: saved on some, continued on others, every parameterization, what it refuses.

    python -m tests.distributed.trainer FOLDER CASE...

runs cases of :data:`CASES` in processes that are forked from one, which saves their imports, and prints what each
measured as a line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

# Whatever else a run imports, it should be imported once.
import transformers.models.llama.modeling_llama  # noqa: F401
from safetensors.torch import load_file

from lowrank_optim.cli.main import main
from lowrank_optim.optim.sharding import whole
from lowrank_optim.pretrain.command_line import parse_options
from lowrank_optim.pretrain.metrics import read_metrics
from lowrank_optim.pretrain.trainer import Trainer
from tests.pretrain.conftest import MODEL, documents, write_shard

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "data"
C4_MODEL = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 32128}
# Eight sequences an update, however many processes share them.
LINE = [
    *("--seq-len", "24", "--batch-size", "2", "--max-steps", "8", "--warmup-steps", "1", "--save-every", "2"),
    *("--keep", "0", "--eval-every", "4", "--eval-batches", "3", "--sample-tokens", "0", "--loss-limit", "0"),
]
GALORE = ["--optimizer-args", "rank=4", "update_proj_gap=3"]
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

    def run(self, name: str, world: int, *more: str, expected: int = 0, act: Callable[[list[str]], int] = main) -> str:
        """Train in ``name`` on so many processes; returns what they printed."""
        line = [*self.common, "--output-dir", str(self.folder / name), *more]
        if "--accumulate" not in more:
            line += ["--accumulate", str(max(1, SEQUENCES // 2 // world))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [self.folder / f"{name}.{rank}.log" for rank in range(world)]
        started = [
            CONTEXT.Process(target=_enter, args=(rank, world, port, logs[rank], line, act)) for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        said = "".join(log.read_text(encoding="utf-8") for log in logs)
        statuses = [process.exitcode for process in started]
        assert statuses == [expected] * world, f"{name}: {statuses}\n{said}"
        return said

    def continued(self, name: str, source: str, world: int, *more: str, step: int = 4, **how: Any) -> str:
        """Go on from a checkpoint of another folder."""
        return self.run(name, world, "--resume", str(self.folder / source / f"checkpoint-{step}"), *more, **how)

    def losses(self, name: str, *, after: int = 0) -> list[float]:
        """Of every update and evaluation."""
        rows = read_metrics(self.folder / name / "metrics.jsonl")
        return [row["loss"] if "loss" in row else row["eval_loss"] for row in rows if row["step"] > after]

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        path = self.folder / name / f"checkpoint-{step}"
        factored = path / "factored.safetensors"
        return load_file(factored if factored.exists() else path / "model.safetensors")

    def differ(self, name: str, other: str, *, after: int, step: int = 8) -> dict[str, float]:
        """The largest difference of losses, and of weights as a share of their largest value."""
        pairs = list(zip(self.losses(name, after=after), self.losses(other, after=after), strict=True))
        assert len(pairs) > 1
        ours, theirs = self.weights(name, step), self.weights(other, step)
        shares = [
            float((ours[key].double() - values.double()).abs().max() / values.double().abs().max().clamp(min=1e-30))
            for key, values in theirs.items()
            if values.numel()
        ]
        return {"loss": max(abs(a - b) for a, b in pairs), "weights": max(shares)}


CONTEXT = multiprocessing.get_context("fork")


def _enter(rank: int, world: int, port: int, log: Path, line: list[str], act: Callable[[list[str]], int]) -> None:
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
        try:
            status = act(line)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        # What a process would clean up at its end was made before the fork.
        os._exit(status)


def state(line: list[str]) -> int:
    """In place of a run: write all that it goes on from, whole, beside its folder."""
    options = parse_options(line)
    loaded = Trainer(options, Path(str(options.output_dir)))
    states = loaded.optimizer.state_dict()["state"]
    found = {f"{i} {key}": whole(torch.as_tensor(value)) for i, one in states.items() for key, value in one.items()}
    found |= {name: whole(tensor) for name, tensor in loaded.model.state_dict().items()}
    if loaded.leads:
        torch.save(found, f"{options.output_dir}.pt")
    return 0


def start(line: list[str]) -> int:
    """In place of a run: write how a process of a new run begins."""
    options = parse_options(line)
    made = Trainer(options, Path(str(options.output_dir)))
    weights = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    torch.save((weights, torch.rand(4)), f"{options.output_dir}.{made.rank}.pt")
    return 0


def elastic(runs: Runs, *more: str) -> dict[str, Any]:
    """A run on two processes; saved after 4 updates, continued on one, saved after 6, continued on four."""
    runs.run("two", 2, *GALORE, *more)
    runs.continued("one", "two", 1, *GALORE, *more)
    runs.continued("four", "one", 4, *GALORE, *more, step=6)
    for world in (1, 2, 4):
        runs.continued(f"state{world}", "two", world, *GALORE, *more, act=state)
    states = [torch.load(runs.folder / f"state{world}.pt", weights_only=True) for world in (1, 2, 4)]
    gaps = [
        float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
        for changed in states[1:]
        for one, other in ((states[0][key], changed[key]) for key in states[0])
    ]
    assert all(states[0].keys() == changed.keys() for changed in states)
    return {
        "state": max(gaps),
        "on one": runs.differ("one", "two", after=4),
        "on four": runs.differ("four", "two", after=6),
        "evaluations": abs(runs.losses("four", after=6)[-1] - runs.losses("two")[-1]),
    }


def there_and_back(runs: Runs) -> dict[str, Any]:
    """Either kind of checkpoint continued in the other way; of moments in 8 bits too."""
    eight = ["--optimizer", "GaLoreAdamW8bit", *GALORE]
    found = {}
    for name, line in (("fp32", GALORE), ("8 bits", eight)):
        runs.run(f"split {name}", 2, *line, "--fsdp")
        runs.continued(f"to copies {name}", f"split {name}", 2, *line)
        runs.continued(f"to shards {name}", f"to copies {name}", 2, *line, "--fsdp", step=6)
        found[f"{name}, to copies"] = runs.differ(f"to copies {name}", f"split {name}", after=4)
        found[f"{name}, to shards"] = runs.differ(f"to shards {name}", f"split {name}", after=6)
    return found


# What is trained in which way; the first is one process.
WAYS: dict[str, list[str]] = {
    "sltrain": ["--parameterization", "sltrain", "--parameterization-args", "rank=4", "sparsity=0.1"],
    "lost": ["--parameterization", "lost", "--parameterization-args", "rank=4"],
    "cola, clipped": ["--parameterization", "cola", "--parameterization-args", "rank=4", "--grad-clip", "0.1"],
    "tied, checkpointing": [*GALORE, "--checkpointing", "--grad-clip", "0.1"],
    "AdamW": ["--optimizer", "AdamW"],
    "Fira": ["--optimizer", "FiraAdamW", *GALORE],
    "per layer": [*GALORE, "--per-layer", "--grad-clip", "0.1"],
}


def ways(runs: Runs) -> dict[str, Any]:
    """One process against two with copies and two with shards, which go on from what they have saved."""
    found = {}
    tied = runs.folder / "tied.json"
    tied.write_text(json.dumps(MODEL | {"tie_word_embeddings": True}), encoding="utf-8")
    for name, options in WAYS.items():
        line = [*options, "--model", str(tied)] if name.startswith("tied") else options
        # One micro-batch an update: with several, per-layer runs take their first basis from the first.
        runs.run(f"{name} one", 1, *line, "--batch-size", "8", "--accumulate", "1", *EVALUATED)
        for way, more in (("copies", []), ("shards", ["--fsdp"])):
            pair = [*line, *more, "--batch-size", "4", "--accumulate", "1"]
            runs.run(f"{name} {way}", 2, *pair)
            found[f"{name}, {way}"] = runs.differ(f"{name} {way}", f"{name} one", after=0)
        # Copies are saved as one process is.
        runs.continued(f"{name} again", f"{name} shards", 2, *pair)
        found[f"{name}, resumed"] = runs.differ(f"{name} again", f"{name} shards", after=4)
    return found


# As many held-out sequences as elsewhere.
EVALUATED = ["--eval-batches", "2"]


def others(runs: Runs) -> dict[str, Any]:
    """int8 weights on copies, random numbers, a damaged shard, an update that cannot be shared, Accelerate's FSDP2."""
    found: dict[str, Any] = {}
    int8 = [*GALORE, "--weights", "int8"]
    runs.run("int8 one", 1, *int8)
    runs.run("int8 two", 2, *int8)
    # Of the first update: afterwards a rounding decides over a code.
    found["int8"] = abs(runs.losses("int8 one")[1] - runs.losses("int8 two")[1])
    found["int8, last loss"] = abs(runs.losses("int8 one")[-1] - runs.losses("int8 two")[-1])
    runs.run("start", 2, *GALORE, act=start)
    (first, drawn), (second, other) = (
        torch.load(runs.folder / f"start.{rank}.pt", weights_only=True) for rank in range(2)
    )
    found["weights start equal"] = all(torch.equal(first[name], second[name]) for name in first)
    found["random numbers differ"] = not torch.equal(drawn, other)
    runs.run("split", 2, *GALORE, "--fsdp")
    before = runs.losses("split")
    shard = next((runs.folder / "split" / "checkpoint-8" / "shards").iterdir())
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main(["verify", str(runs.folder / "split")]) == 1
    said = runs.run("split", 2, *GALORE, "--fsdp", "--resume", "auto")
    found["broken shard"] = "passed over" in said and runs.losses("split") == before
    ternary = ["--parameterization", "ternarylowrank", "--parameterization-args", "rank=3", "--fsdp"]
    found["scalar"] = "gate is a scalar" in runs.run("ternary", 2, *ternary, expected=2)
    said = runs.continued("unshared", "split", 4, *GALORE, "--batch-size", "4", expected=2)
    found["unshared"] = next(line for line in said.splitlines() if "error" in line)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    runs.run("accelerate", 2, *GALORE)
    del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"]
    found["accelerate"] = (runs.folder / "accelerate" / "checkpoint-8" / "shards").is_dir()
    return found


def lose(runs: Runs, name: str, number: int) -> dict[str, Any]:
    """Send a signal to the second of two processes of torchrun, and continue on one."""
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [str(ROOT / "train_llama.py"), *runs.common, *GALORE, "--output-dir", str(runs.folder / name)]
    launcher = subprocess.Popen(
        [*begin, *line, "--max-steps", "100000", "--accumulate", "2", "--fsdp"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (runs.folder / name / "checkpoint-2").exists():
        time.sleep(0.1)
        assert launcher.poll() is None, launcher.communicate()[1]
    os.kill(_worker(launcher.pid, 1), number)
    began = time.monotonic()
    said = launcher.communicate()[1]
    seconds = time.monotonic() - began
    saved = max(int(path.name.partition("-")[2]) for path in (runs.folder / name).glob("checkpoint-*"))
    resumed = runs.run(name, 1, *GALORE, "--resume", "auto", "--max-steps", str(saved + 2))
    return {
        "seconds": round(seconds, 1),
        "status": launcher.returncode,
        # Behind a bar of progress, perhaps.
        "said": said[said.index("lowrank-train: error") :].splitlines()[0],
        "continued on one": f"checkpoint-{saved} after {saved} updates" in resumed,
    }


def _worker(launcher: int, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
    raise AssertionError(f"no process {rank} below {launcher}")


def c4(runs: Runs) -> dict[str, Any]:
    """Sharded training on the sample of C4 by two processes, continued on one."""
    (runs.folder / "config.json").write_text(json.dumps(MODEL | C4_MODEL), encoding="utf-8")
    line = [
        *GALORE, "--dataset", str(SAMPLES / "c4_sample" / "en"), "--tokenizer", str(SAMPLES / "tokenizers" / "t5-base"),
        "--seq-len", "64", "--max-steps", "20", "--save-every", "10", "--eval-every", "10",
    ]  # fmt: skip
    runs.run("two", 2, *line, "--fsdp")
    runs.continued("one", "two", 1, *line, step=10)
    found = runs.differ("one", "two", after=10, step=20)
    ends = {f"validation loss, {name}": runs.losses(name)[-1] for name in ("two", "one")}
    return {**found, **ends, "validation loss, untrained": runs.losses("two")[0]}


def smoke(runs: Runs) -> dict[str, Any]:
    """A sharded run of two processes, continued by one."""
    line = [*GALORE, "--max-steps", "6", "--save-every", "4", "--eval-every", "6", "--eval-batches", "1"]
    runs.run("two", 2, *line, "--fsdp")
    runs.continued("one", "two", 1, *line)
    return runs.differ("one", "two", after=4, step=6)


CASES: dict[str, Callable[[Runs], Any]] = {
    "smoke": smoke,
    "copies": elastic,
    "shards": lambda runs: elastic(runs, "--fsdp"),
    "there and back": there_and_back,
    "ways": ways,
    "others": others,
    "killed": lambda runs: lose(runs, "run", signal.SIGKILL),
    "frozen": lambda runs: lose(runs, "run", signal.SIGSTOP),
    "c4": c4,
}


if __name__ == "__main__":
    for case in sys.argv[2:]:
        print(json.dumps({case: CASES[case](Runs(Path(sys.argv[1]) / case.replace(" ", "-")))}), flush=True)
