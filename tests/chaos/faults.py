"""Faults of every kind, and what a run makes of them: noticed or harmless, nothing lost, the same end bit for bit."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from lowrank_optim.pretrain import checkpoint, manifest
from lowrank_optim.pretrain.launch import LOCK
from lowrank_optim.pretrain.metrics import read_metrics
from tests.chaos.server import Run, Server
from tests.optimizers import OPTIMIZERS, accepts
from tests.pretrain.conftest import documents
from tests.pretrain.logs import rows

MODEL = Path(__file__).parents[1] / "golden" / "checkpoints" / "model.json"
RUN = (
    "--seq-len 16 --batch-size 2 --accumulate 2 --lr 0.01 --warmup-steps 0 --max-steps 6 --save-every 2 --keep 0"
    " --eval-every 3 --eval-batches 2 --sample-tokens 0 --resume auto"
)
MODES = {
    "dense": [],
    "per_layer": ["--per-layer"],
    "int8": ["--weights", "int8"],
    "int4": ["--weights", "int4"],
    "sltrain": ["--parameterization", "sltrain", "--parameterization-args", "rank=2"],
}
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
Rows = list[dict[str, Any]]


class Outcome(NamedTuple):
    """Of one fault.

    noticed: it was refused or passed over in one line, or made no difference.
    lost: updates that a whole checkpoint held and the continuation made anew, or that a signal cost.
    identical: the end is that of a run without the fault. None: there is no such end.
    """

    kind: str
    noticed: bool
    lost: int
    identical: bool | None
    told: str = ""


def combinations() -> dict[str, list[str]]:
    """The flags of every optimizer with every mode that it has."""
    found = {"AdamW-dense": ["--optimizer", "AdamW"]}
    for name in OPTIMIZERS:
        args = [f"{key}=2" for key in ("rank", "update_proj_gap") if accepts(name, key)]
        optimizer = ["--optimizer", name, *(["--optimizer-args", *args] if args else [])]
        own = {"LOROAdamW": "loro", "SSTAdamW": "sst"}.get(name)
        if own:
            layers = ["--parameterization", own, "--parameterization-args", "rank=2"]
            found[f"{name}-{own}"] = optimizer + layers
            found[f"{name}-{own}-per_layer"] = [*optimizer, *layers, "--per-layer"]
        else:
            found |= {f"{name}-{mode}": optimizer + flags for mode, flags in MODES.items()}
    return found


class Bench:
    """Runs with faults in a folder, and without, to compare with.

    Attributes:
        without: the combinations that there are not, and why.
    """

    def __init__(self, place: Path, without: dict[str, str] | None = None) -> None:
        self.place, self.server = place, Server()
        self.without = {} if without is None else without
        self.combinations = combinations()
        self.made: dict[str, Path] = {}
        self.events: dict[str, int] = {}
        data = place / "data"
        data.mkdir()
        for name, number in (("train", 40), ("validation", 6)):
            texts = [json.dumps({"text": text}) + "\n" for text in documents(number, len(name))]
            (data / f"{name}.jsonl").write_text("".join(texts), encoding="utf-8")
        self.common = ["--dataset", str(data), "--model", str(MODEL), *RUN.split()]

    def line(self, combination: str) -> list[str]:
        return [*self.common, *self.combinations[combination]]

    def reference(self, combination: str) -> Path:
        """The folder of a run without faults, with all checkpoints."""
        if combination not in self.made:
            run = self.whole(combination)
            assert run.status == 0, run.err
        return self.made[combination]

    def whole(self, combination: str) -> Run:
        """The run without faults itself."""
        folder = self.place / f"whole-{combination}"
        run = self.server.run(self.line(combination), folder)
        if run.status == 0:
            self.made[combination], self.events[combination] = folder, run.events
        return run

    def fits(self, combination: str) -> bool:
        """Whether an optimizer has a mode: one that it has not is refused in one line."""
        if combination not in self.made:
            run = self.whole(combination)
            if run.status:
                assert in_one_line(run), run.err
                self.without[combination] = run.err.strip()
        return combination in self.made

    def folder(self) -> Path:
        """A new one for a run with faults."""
        folder = self.place / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def finish(self, kind: str, combination: str, folder: Path, *, noticed: bool = True, told: str = "") -> Outcome:
        """Continue without faults, from the newest whole checkpoint, and compare the end."""
        before, _ = checkpoint.newest_whole(checkpoint.checkpoints(folder)[::-1])
        run = self.server.run(self.line(combination), folder)
        lost = step_of(before) - resumed(run)
        same, how = self.compare(combination, folder, run)
        return Outcome(kind, noticed, lost, same, f"{combination}: {how} {told}")

    def compare(self, combination: str, folder: Path, run: Run) -> tuple[bool, str]:
        """Whether a run has ended as it would have without faults, and where it differs."""
        if run.status or strange(run):
            return False, f"status {run.status} {run.err}"
        how = difference(end(self.reference(combination)), end(folder))
        return not how, how

    def killed(self, combination: str, rng: random.Random) -> Iterator[Outcome]:
        """SIGKILL before a write, then at any time after another, then the rest."""
        self.reference(combination)
        folder = self.folder()
        for kind, after in (("SIGKILL within writes", 0.0), ("SIGKILL at any time", rng.uniform(0, 0.15))):
            before, _ = checkpoint.newest_whole(checkpoint.checkpoints(folder)[::-1])
            at = rng.randint(1, self.events[combination] // 2)
            run = self.server.run(self.line(combination), folder, at=at, signals=[signal.SIGKILL], after=after)
            lost = step_of(before) - resumed(run) if "resumed" in run.out else 0
            yield Outcome(kind, run.status in (-signal.SIGKILL, 0), lost, None, f"{combination}: {run.err}")
        yield self.finish("continued after SIGKILL", combination, folder)

    def stopped(self, combination: str, number: int, rng: random.Random, *, twice: bool = False) -> Outcome:
        """A signal that a run saves at, and no update is lost."""
        self.reference(combination)
        folder, at = self.folder(), rng.randint(1, self.events[combination])
        signals = [number, number] if twice else [number]
        run = self.server.run(self.line(combination), folder, at=at, signals=signals, after=rng.uniform(0, 0.1))
        whole, _ = checkpoint.newest_whole(checkpoint.checkpoints(folder)[::-1])
        # Before the run listens it ends as the system has it, and at its end all is done.
        clean = run.status in (128 + number, -number, 0) and not strange(run)
        lost = 0 if twice else logged(folder) - step_of(whole)
        name = signal.Signals(number).name
        outcome = self.finish(f"{name}{' twice' * twice}", combination, folder, noticed=clean, told=run.err)
        return outcome._replace(lost=outcome.lost + lost)

    def refused(self, combination: str, code: int, rng: random.Random) -> Outcome:
        """Errors of the disk from some moment on."""
        self.reference(combination)
        folder = self.folder()
        run = self.server.run(self.line(combination), folder, at=rng.randint(1, self.events[combination]), errno=code)
        return self.finish(errno.errorcode[code], combination, folder, noticed=in_one_line(run), told=run.err)

    def limited(self, combination: str, largest: int) -> Outcome:
        """No room for files beyond a size."""
        self.reference(combination)
        folder = self.folder()
        run = self.server.run(self.line(combination), folder, largest=largest)
        return self.finish("file too large", combination, folder, noticed=in_one_line(run), told=run.err)

    def removed(self, combination: str, how: str, rng: random.Random) -> Outcome:
        """The folder is removed, or another put in its place, while the run goes on."""
        self.reference(combination)
        folder = self.folder()
        # The events of the start are over, and a save is to come.
        at = rng.randint(8, self.events[combination] // 2)
        run = self.server.run(self.line(combination), folder, at=at, remove=how)
        noticed = in_one_line(run) and run.status == 2
        # Whatever was saved before has been removed by hand.
        again = self.server.run(self.line(combination), folder)
        same = again.status == 0 and saved(folder) == saved(self.reference(combination))
        return Outcome(f"folder {how}d", noticed, 0, same, run.err + again.err)

    def locked(self, combination: str) -> Outcome:
        """Another run holds the folder."""
        folder = self.folder()
        folder.mkdir()
        with FileLock(folder / LOCK):
            run = self.server.run(self.line(combination), folder)
        noticed = in_one_line(run) and "another run" in run.err
        return self.finish("second run", combination, folder, noticed=noticed, told=run.err)

    def damaged(self, combination: str, kind: str, damage: Any, *, continued: bool) -> Outcome:
        """Damage to the newest of two checkpoints; ``damage`` gets its folder and the other's.

        Args:
            continued: whether to run on. Which checkpoint is taken is known without.
        """
        folder = self.folder()
        shutil.copytree(self.reference(combination), folder)
        shutil.rmtree(folder / "checkpoint-6")
        before = manifest.of_folder(folder / "checkpoint-4")
        damage(folder / "checkpoint-4", folder / "checkpoint-2")
        # The same tokenizer, for instance, from another run.
        harmless = manifest.of_folder(folder / "checkpoint-4") == before
        found, passed_over = checkpoint.newest_whole(checkpoint.find("auto", folder))
        # Without its state.json it is none.
        noticed = harmless or bool(passed_over) or not (folder / "checkpoint-4" / "state.json").is_file()
        whole = 4 if harmless else 2
        if not continued:
            return Outcome(kind, noticed, whole - step_of(found), None, f"{combination}: {found}")
        run = self.server.run(self.line(combination), folder)
        told = "warning: passed over" in run.out or "warning: set aside" in run.out
        same, how = self.compare(combination, folder, run)
        return Outcome(kind, noticed and (told or harmless), whole - resumed(run), same, f"{combination}: {how}")


def damages(folder: Path, foreign: Path, rng: random.Random, *, regions: int) -> Iterator[tuple[str, Any]]:
    """Every kind of damage to every file of a checkpoint like ``folder``; ``foreign`` is one of another run."""
    for name in sorted(path.name for path in folder.iterdir()):
        size = (folder / name).stat().st_size
        for region in range(regions):
            at = rng.randrange(
                size * region // regions, max(size * (region + 1) // regions, size * region // regions + 1)
            )
            yield "bit flipped", lambda new, old, name=name, at=at: flip(new / name, at, rng)
        for kept in (size - 1, size // 2):
            yield "truncated", lambda new, old, name=name, kept=kept: cut(new / name, kept)
        yield "emptied", lambda new, old, name=name: cut(new / name, 0)
        yield "missing", lambda new, old, name=name: (new / name).unlink()
        yield "longer", lambda new, old, name=name, size=size: cut(new / name, size + 1)
        yield "swapped", lambda new, old, name=name: shutil.copy(old / name, new / name)
        yield "foreign", lambda new, old, name=name: shutil.copy(foreign / name, new / name)
        yield "noise", lambda new, old, name=name, size=size: (new / name).write_bytes(rng.randbytes(size))
    yield "folder emptied", lambda new, old: [path.unlink() for path in new.iterdir()]
    yield "swapped", lambda new, old: [shutil.rmtree(new), shutil.copytree(old, new)]


def flip(path: Path, at: int, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def end(folder: Path) -> tuple[Any, Rows]:
    """What a finished run has come to, and all that it logged."""
    return saved(folder), rows(folder)


def saved(folder: Path) -> Any:
    """What its last checkpoint holds."""
    last = checkpoint.checkpoints(folder)[-1]
    state = json.loads((last / "state.json").read_text())
    # A tokenizer that was loaded writes more of its settings than one that was made.
    left_out = (".pt", "tokenizer_config.json", "special_tokens_map.json")
    files = {name: file for name, file in state["files"].items() if not name.endswith(left_out)}
    optimizer, processes = (torch.load(last / name, weights_only=True) for name in checkpoint.NEEDED)
    for group in optimizer["optimizer"]["param_groups"]:
        # A load gives groups keys that say nothing: "differentiable" is False and "clip_norm" None.
        for key in [key for key, value in group.items() if value is None or value is False]:
            del group[key]
    return last.name, state["progress"], files, plain(optimizer), plain([process["data"] for process in processes])


def plain(value: Any) -> Any:
    """The same with bytes in place of tensors, which compare as a whole and with NaN."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def difference(one: Any, other: Any, where: str = "") -> str:
    """Where two nested values differ first, "" where they do not."""
    if one == other:
        return ""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(filter(None, (difference(one[key], other[key], f"{where}.{key}") for key in one)))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return next(filter(None, (difference(a, b, f"{where}.{i}") for i, (a, b) in enumerate(zip(one, other)))))
    return f"{where} was {str(one)[:80]} and is {str(other)[:80]}"


def logged(folder: Path) -> int:
    """The last update that a run logged."""
    path = folder / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(path)), default=0) if path.is_file() else 0


def resumed(run: Run) -> int:
    """The update that a run continued after."""
    found = re.search(r"^resumed .* after (\d+) updates", run.out, re.MULTILINE)
    return int(found[1]) if found else 0


def step_of(path: Path | None) -> int:
    return int(path.name.split("-")[-1]) if path else 0


def strange(run: Run) -> bool:
    return "Traceback" in run.err or "Exception ignored" in run.err


def in_one_line(run: Run) -> bool:
    """Whether a run ended with one line and status 2, or as if nothing had been."""
    lines = [line for line in run.err.splitlines() if "error:" in line]
    return not strange(run) and ((run.status == 2 and len(lines) == 1) or (run.status == 0 and not lines))
