"""Checkpoints: complete or absent, resumable to the last bit, and each a folder that transformers loads.

``checkpoint-N`` holds the exported model (``config.json``, ``model.safetensors``, the tokenizer), ``optimizer.pt``,
``processes.pt`` (data position and random-number states of every process) and ``state.json``, with the digests of all
others and of itself. A parameterized model is resumed from its parts in ``factored.safetensors``; ``model.safetensors``
holds its merged weights, and is absent where activations between the factors leave nothing to merge.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank_optim.nn.base import FactoredLinear
from lowrank_optim.nn.convert import factored_layers
from lowrank_optim.pretrain import manifest
from lowrank_optim.pretrain.cache import remove_folder, write_folder
from lowrank_optim.pretrain.config import Options, Resolved, UserError
from lowrank_optim.pretrain.divergence import Guard
from lowrank_optim.pretrain.update import Updater

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# 1 (release 0.1) has no digests.
FORMAT = 2
STATE = "state.json"
# What resuming reads beside it, whatever the model.
NEEDED = ("optimizer.pt", "processes.pt")
FACTORED = "factored.safetensors"
WEIGHTS = "model.safetensors"
# A resumed run must continue the one that was saved; how long it runs and what it reports may change.
FIXED = (
    *(
        "dataset",
        "text_field",
        "tokenizer",
        "seq_len",
        "pack",
        "model",
        "init",
        "dtype",
        "optimizer",
        "optimizer_args",
        "lr",
    ),
    *("weight_decay", "grad_clip", "batch_size", "accumulate", "seed"),
    *("parameterization", "parameterization_args", "restarts", "restart_args", "per_layer", "weights"),
    *("accumulate_dtype", "ranks", "graph_step"),
)

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
) -> Path:
    """Write ``folder/checkpoint-<step>`` in one rename, then drop the oldest beyond ``run.keep`` (0 = none).

    The newest one that was not written while the run may have been diverging stays in any case.

    Raises:
        UserError: it cannot be written; whatever was saved before is untouched.
    """
    target = folder / f"checkpoint-{progress.step}"

    def fill(into: Path) -> None:
        _save_model(update.model, into)
        tokenizer.save_pretrained(into)
        _save(update.state_dict(), into / "optimizer.pt")
        _save(processes, into / "processes.pt")
        files = manifest.of_folder(into)
        lost = {*NEEDED, FACTORED if factored_layers(update.model) else WEIGHTS} - files.keys()
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
        newest_good = _good(folder)[-1:]
        for old in checkpoints(folder)[: -update.run.keep]:
            if old not in newest_good:
                remove_folder(old)
    return target


def _save_model(model: PreTrainedModel, into: Path) -> None:
    from safetensors.torch import save_model

    layers = factored_layers(model)
    if not layers:
        # One file whatever the size, because resuming loads it in place.
        model.save_pretrained(into, max_shard_size="1000TB")
        return
    save_model(model, str(into / FACTORED))
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(into)
    if not any(layer.nonlinear for layer in layers.values()):
        _export(model, layers, into)


def _export(model: PreTrainedModel, layers: Mapping[str, FactoredLinear], into: Path) -> None:
    """Write the merged weights, of which one file of 2 GB at a time is in memory."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    with torch.device("meta"):
        dense = type(model)(model.config).to(model.dtype)
    # Tied weights are one parameter.
    split = split_torch_state_dict_into_shards(dict(dense.named_parameters()), max_shard_size="2GB")
    state = model.state_dict()

    def merged(name: str) -> torch.Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        return (state[name] if layer is None else layer.dense_weight()).cpu().contiguous()

    for file, names in split.filename_to_tensors.items():
        save_file({name: merged(name) for name in names}, str(into / file), metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (into / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


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
    return _good(folder)[::-1]


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
        return f"{STATE} is not what was written ({_line(error)})"


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
    try:
        return _read(path)["fingerprint"]
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"Broken checkpoint: {path / STATE} ({error!r})") from error


def read_state(path: Path, options: Resolved, *, processes: int) -> Progress:
    """The progress of a checkpoint, once its run is the one of ``options``.

    Raises:
        UserError: an option that shapes the run differs, or the file cannot be read.
    """
    try:
        state = _read(path)
        # An older version may not have known an option.
        saved, now = {**asdict(Options()), **state["options"]}, json.loads(json.dumps(asdict(options)))
        changed = {name: (saved[name], now[name]) for name in FIXED if saved[name] != now[name]}
        if state["processes"] != processes:
            changed["processes"] = (state["processes"], processes)
        progress = _progress(state["progress"])
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"Broken checkpoint: {path / STATE} ({error!r})") from error
    if changed:
        what = ", ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in changed.items())
        raise UserError(f"Cannot resume {path}: {what}")
    return progress


def load_(path: Path, update: Updater, *, rank: int, digests: bool = False) -> Any:
    """Load a checkpoint in place; returns the data position of process ``rank`` and restores its random states.

    Args:
        path, update, rank: which, into what, and for whom.
        digests: compare all files with their digests beside the load, which takes hardly longer: the disk is read once.

    Raises:
        BrokenCheckpointError: a file is missing or broken. What has been loaded until then is of no use.
    """
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(damage, path) if digests else None
        reason = None
        try:
            _load_weights_(update.model, path)
            saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
            processes = torch.load(path / "processes.pt", map_location="cpu", weights_only=True)
            update.load_state_dict(saved)
            set_random_state(processes[rank]["random"])
            position = processes[rank]["data"]
        except Exception as error:
            reason = _line(error)
    reason = (verdict and verdict.result()) or reason
    if reason:
        raise BrokenCheckpointError(path, reason)
    return position


def _load_weights_(model: PreTrainedModel, path: Path) -> None:
    from safetensors.torch import load_model

    if factored_layers(model):
        load_model(model, path / FACTORED, device="cpu")
    else:
        _load_exported(model, path)


def _load_exported(model: PreTrainedModel, path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_model

    file = path / WEIGHTS
    with safe_open(file, framework="pt") as exported:
        same_names = set(exported.keys()) <= model.state_dict().keys()
    if same_names:
        # Mapped files, copied tensor by tensor: a card without room for two of everything can resume.
        load_model(model, file, device="cpu")
    else:
        # Of some models, those with experts for one, transformers exports tensors under the names of the hub.
        loaded = type(model).from_pretrained(path, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())


def random_state() -> dict[str, Any]:
    """States of every generator of this process, in types that ``weights_only`` loads."""
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


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


def _good(folder: Path) -> list[Path]:
    good = []
    for path in checkpoints(folder):
        try:
            suspect = _progress(_read(path)["progress"]).guard.suspect
        except (OSError, UserError, *UNREADABLE):
            continue
        if not suspect:
            good.append(path)
    return good


def numbered(folder: Path) -> list[Path]:
    """What is called a checkpoint, complete or not, in the order of its updates."""
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.split("-")[-1])
