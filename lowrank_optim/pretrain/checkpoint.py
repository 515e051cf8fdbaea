"""Checkpoints: complete or absent, resumable to the last bit, and each a folder that transformers loads.

``checkpoint-N`` holds the exported model (``config.json``, ``model.safetensors``, the tokenizer), ``optimizer.pt``,
``processes.pt`` (data position and random-number states of every process) and ``state.json``, with the digests of all
others and of itself. A parameterized model is resumed from its parts in ``factored.safetensors``; ``model.safetensors``
holds its merged weights, and is absent where activations between the factors leave nothing to merge.

Of a run with ``--fsdp`` the optimizer's tensors are in ``shards`` (:mod:`lowrank_optim.pretrain.sharded_checkpoint`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank_optim.nn.convert import factored_layers
from lowrank_optim.pretrain import manifest
from lowrank_optim.pretrain.cache import remove_folder, write_folder
from lowrank_optim.pretrain.config import Options, Resolved, UserError, line_of
from lowrank_optim.pretrain.divergence import Guard
from lowrank_optim.pretrain.random_state import seed_of, set_random_state
from lowrank_optim.pretrain.sharded_checkpoint import SHARDS, Gathered, join
from lowrank_optim.pretrain.update import Updater
from lowrank_optim.pretrain.weight_files import FACTORED, WEIGHTS, load_weights_, save_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# 1 (release 0.1) has no digests.
FORMAT = 2
STATE = "state.json"
# What resuming reads beside it, whatever the model.
NEEDED = ("optimizer.pt", "processes.pt")
# A resumed run must continue the one that was saved; how long it runs and what it reports may change.
FIXED = (
    *("dataset", "text_field", "tokenizer", "seq_len", "pack", "model", "init", "dtype", "optimizer", "optimizer_args"),
    *("lr", "weight_decay", "grad_clip", "batch_size", "accumulate", "seed"),
    *("parameterization", "parameterization_args", "restarts", "restart_args", "per_layer", "weights"),
    *("accumulate_dtype", "ranks"),
)

# What follows the number of processes: their product with it stays.
OF_PROCESSES = ("batch_size", "accumulate")

# What reading a damaged state.json raises.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class BrokenCheckpointError(UserError):
    """A checkpoint is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"Broken checkpoint: {path}: {reason}")
        self.reason = reason


@dataclass
class Progress:
    """Where a run stands, beside the tensors of model and optimizer; ``rollbacks`` counts those after a divergence."""

    step: int = 0
    tokens: int = 0
    untrained_loss: float | None = None
    rollbacks: int = 0
    guard: Guard = field(default_factory=Guard)


def save(
    folder: Path,
    progress: Progress,
    update: Updater,
    *,
    tokenizer: PreTrainedTokenizerBase,
    processes: list[dict[str, Any]],
    fingerprint: Any,
    gathered: Gathered | None = None,
) -> Path:
    """Write ``folder/checkpoint-<step>`` in one rename, then drop the oldest beyond ``run.keep`` (0 = none).

    The newest one that was not written while the run may have been diverging stays in any case.

    Raises:
        UserError: it cannot be written; whatever was saved before is untouched.
    """
    target = folder / f"checkpoint-{progress.step}"
    model = gathered.model if gathered else update.model

    def fill(into: Path) -> None:
        save_weights(model, into)
        tokenizer.save_pretrained(into)
        _save(gathered.states if gathered else update.state_dict(), into / "optimizer.pt")
        if gathered:
            os.rename(gathered.shards, into / SHARDS)
        _save(processes, into / "processes.pt")
        files = manifest.of_folder(into)
        lost = {*NEEDED, FACTORED if factored_layers(model) else WEIGHTS} - files.keys()
        if lost:
            # Libraries make folders again that somebody removes while they write.
            raise UserError(f"{into.name} was removed while it was written")
        state = {
            "format": FORMAT,
            "progress": asdict(progress),
            "fingerprint": fingerprint,
            "processes": len(processes),
            "options": asdict(update.run),
            "torch": torch.__version__,
            "files": files,
        }
        state["digest"] = manifest.of_values(state)
        (into / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    try:
        write_folder(target, fill)
    # A full disk surfaces as OSError, as torch's RuntimeError or as safetensors' own exception.
    except Exception as error:
        before = checkpoints(folder)
        kept = f"{before[-1]} is intact" if before else "no earlier checkpoint exists"
        raise UserError(f"Cannot save {target}: {_reason(error)}; {kept}") from error
    if update.run.keep:
        newest_good = last_good(folder)[:1]
        for old in checkpoints(folder)[: -update.run.keep]:
            if old not in newest_good:
                remove_folder(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in numbered(folder) if (path / STATE).is_file()]


def find(resume: str | None, output_dir: Path | None) -> list[Path]:
    """The checkpoints that ``--resume`` may mean, best first; none for a fresh start.

    Raises:
        UserError: nothing to resume at a given path, or results in ``output_dir`` that a run would overwrite.
    """
    there = checkpoints(output_dir) if output_dir else []
    if resume == "auto":
        return there[::-1]
    if resume is None:
        if there:
            raise UserError(f"{output_dir} holds a run already: add --resume auto or choose another --output-dir")
        return []
    path = Path(resume)
    found = path if (path / STATE).is_file() else next(iter(checkpoints(path)[::-1]), None)
    if found is None:
        raise UserError(f"Invalid resume: {resume} is no checkpoint and holds none")
    later = [p for p in there if _step(p) > _step(found)]
    if later:
        raise UserError(f"Invalid resume: {later[-1]} is newer than {found}; choose another --output-dir")
    return [found]


def newest_whole(
    found: Sequence[Path], *, digests: bool = True, most: float = math.inf
) -> tuple[Path | None, dict[Path, str]]:
    """The first of ``found`` that is whole as :func:`damage` sees it, and what is wrong with those before it.

    Raises:
        UserError: there are some, and none is whole.
    """
    wrong: dict[Path, str] = {}
    for path in found:
        reason = damage(path, digests=digests, most=most)
        if reason is None:
            return path, wrong
        wrong[path] = reason
    if wrong:
        raise UserError("Broken checkpoint: " + "; ".join(f"{path}: {reason}" for path, reason in wrong.items()))
    return None, wrong


def last_good(folder: Path) -> list[Path]:
    """The checkpoints that were not written while the run may have been diverging, newest first."""
    good = []
    for path in checkpoints(folder)[::-1]:
        # What cannot be read is no place to go back to.
        with suppress(OSError, UserError, *UNREADABLE):
            if not _progress(_read(path)["progress"]).guard.suspect:
                good.append(path)
    return good


def damage(path: Path, *, digests: bool = True, most: float = math.inf) -> str | None:
    """What is wrong with a checkpoint in one line, None where it is whole.

    Args:
        path: its folder.
        digests: read and compare all files, instead of their presence alone. One of format 1 has no digests.
        most: the size of a file in bytes up to which it is read.
    """
    try:
        state = _read(path)
        weights = FACTORED if (path / FACTORED).exists() else WEIGHTS
        missing = [name for name in (weights, *NEEDED) if not (path / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        if path.name != f"checkpoint-{state['progress']['step']}" and path in numbered(path.parent):
            return f"{STATE} is that of update {state['progress']['step']}"
        if state["format"] == 1 or not digests:
            return None
        if manifest.of_values({key: value for key, value in state.items() if key != "digest"}) != state["digest"]:
            return f"{STATE} is not what was written (its digest differs)"
        return manifest.damage(path, state["files"], most=most)
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror or error})"
    except UNREADABLE as error:
        return f"{STATE} is not what was written ({line_of(error)})"


def set_aside(folder: Path, step: int, mark: str) -> list[Path]:
    """Rename what is called a checkpoint beyond ``step``, or is none, so that it is out of the way and nothing is lost.

    Returns:
        The new names, ``checkpoint-<N>.<mark>``.
    """
    moved = []
    for path in numbered(folder):
        if _step(path) > step or not (path / STATE).is_file():
            target = path.with_name(f"{path.name}.{mark}")
            if target.exists():
                remove_folder(target)
            os.rename(path, target)
            moved.append(target)
    return moved


def read_fingerprint(path: Path) -> Any:
    """What a checkpoint says of its data.

    Raises:
        UserError: the file cannot be read.
    """
    with _reading(path):
        return _read(path)["fingerprint"]


def accumulation(path: Path, run: Resolved, *, processes: int) -> int:
    """The micro-batches an update with which a run goes on on ``processes``: its sequences stay as many.

    Raises:
        UserError: they cannot share the sequences of an update, or the file cannot be read.
    """
    with _reading(path):
        state = _read(path)
        before, size, accumulate = state["processes"], *(state["options"][name] for name in OF_PROCESSES)
        if before == processes:
            return run.accumulate
        sequences, together = size * accumulate * before, run.batch_size * processes
        now, rest = divmod(sequences, together)
    if rest:
        sizes = [n for n in range(1, sequences + 1) if sequences % (n * processes) == 0]
        way = f"--batch-size {' or '.join(map(str, sizes))}" if sizes else "another number of processes"
        raise UserError(
            f"Cannot resume {path}: an update has {sequences} sequences, which {processes} processes with "
            f"{run.batch_size} each cannot share; use {way}"
        )
    if run.per_layer and (accumulate == 1) != (now == 1):
        raise UserError(
            f"Cannot resume {path}: with --per-layer bases come from one micro-batch an update or from several, and "
            f"{accumulate} would become {now}; use another --batch-size"
        )
    return now


def read_state(path: Path, options: Resolved, *, processes: int) -> Progress:
    """The progress of a checkpoint, once its run is the one of ``options``.

    Raises:
        UserError: an option that shapes the run differs, or the file cannot be read.
    """
    with _reading(path):
        state = _read(path)
        # An older version may not have known an option.
        saved, now = {**asdict(Options()), **state["options"]}, json.loads(json.dumps(asdict(options)))
        changed = {name: (saved[name], now[name]) for name in FIXED if saved[name] != now[name]}
        if state["processes"] != processes:
            changed = {name: values for name, values in changed.items() if name not in OF_PROCESSES}
        progress = _progress(state["progress"])
    if changed:
        what = ", ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in changed.items())
        raise UserError(f"Cannot resume {path}: {what}")
    return progress


def load_(
    path: Path,
    update: Updater,
    *,
    rank: int,
    world: int = 1,
    digests: bool = False,
    any_: Callable[[bool], bool] = bool,
) -> Any:
    """Load a checkpoint in place; returns the data position and restores the random states of process ``rank``.

    Of another number of processes each goes on with random numbers that follow from seed, update and rank.

    Args:
        path, update, rank, world: which, into what, and for whom.
        digests: compare all files with their digests beside the load, which takes hardly longer: the disk is read once.
        any_: whether something is so on any process.

    Raises:
        BrokenCheckpointError: a file is missing or broken. What has been loaded until then is of no use.
    """
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(damage, path) if digests else None
        reason = None
        try:
            load_weights_(update.model, path)
            saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
            processes = torch.load(path / "processes.pt", map_location="cpu", weights_only=True)
            # Between two updates the same on all processes.
            position = processes[0]["data"]
        except Exception as error:
            reason = line_of(error)
        # From here on processes may need each other.
        if not any_(reason is not None):
            try:
                update.load_state_dict(join(saved, path, update.optimizer))
                if len(processes) == world:
                    set_random_state(processes[rank]["random"])
                else:
                    torch.manual_seed(seed_of(update.run.seed, rank, _read(path)["progress"]["step"]))
            except Exception as error:
                reason = line_of(error)
    reason = (verdict and verdict.result()) or reason
    if reason:
        raise BrokenCheckpointError(path, reason)
    return position


def _save(value: Any, path: Path) -> None:
    # Through a file of Python, whose errors say what is wrong; torch's own writer reports a full disk as
    # "unexpected pos".
    with path.open("wb") as file:
        torch.save(value, file)


def _reason(error: BaseException) -> str:
    # Closing its archive after a failed write, torch.save raises a second error on top.
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__context__
    return " ".join(str(first or error).split())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"Broken checkpoint: {path / STATE} ({error!r})") from error


def _read(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: a format of a later version.
        OSError, UNREADABLE: it is no such file.
    """
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["format"] not in range(1, FORMAT + 1):
        raise UserError(f"Cannot resume {path}: its format is {state['format']!r}, expected at most {FORMAT}")
    return dict(state)


def _progress(saved: Mapping[str, Any]) -> Progress:
    guard = Guard(**saved.get("guard", {}))
    progress = Progress(**{**saved, "guard": guard})
    numbers = (progress.step, progress.tokens, progress.rollbacks, guard.suspect)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or not all(isinstance(x, float) for x in guard.losses):
        raise ValueError(f"Invalid progress: {progress}")
    return progress


def numbered(folder: Path) -> list[Path]:
    """What is called a checkpoint, complete or not, in the order of its updates."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.split("-")[-1])
