"""From the fields of :class:`Options` to flags and YAML, and back."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from lowrank_optim.optim.validation import nearest
from lowrank_optim.pretrain.config import Options, UserError

FIELDS = {field.name: field for field in dataclasses.fields(Options)}
HINTS = get_type_hints(Options)
# Settings that come with the package, by name.
CONFIGS = Path(__file__).parent.parent / "configs"
# What belongs to one invocation and not to the run that it describes.
TRANSIENT = ("config", "resume", "dry_run", "allow_changed_data")
POSITIVE = ("checkpoint_every", "seq_len", "batch_size", "accumulate", "max_steps", "log_every")
NOT_NEGATIVE = (
    *("weight_decay", "warmup_steps", "grad_clip", "seed", "eval_every", "eval_batches", "save_every"),
    *("keep", "sample_tokens", "max_bad_documents", "max_time", "loss_limit"),
    "process_timeout",
)


HELP = "; --help lists the options"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are :class:`UserError`, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


# What other programs call it, where that is no spelling of ours.
SYNONYMS = {
    "learning-rate": "lr", "gradient-accumulation-steps": "accumulate", "accumulation-steps": "accumulate",
    "grad-accum": "accumulate", "per-device-train-batch-size": "batch-size", "train-batch-size": "batch-size",
    "micro-batch-size": "batch-size", "bs": "batch-size", "max-length": "seq-len", "max-seq-length": "seq-len",
    "seq-length": "seq-len", "sequence-length": "seq-len", "context-length": "seq-len", "block-size": "seq-len",
    "num-training-steps": "max-steps", "steps": "max-steps", "num-steps": "max-steps", "iterations": "max-steps",
    "max-iters": "max-steps", "warmup": "warmup-steps", "max-grad-norm": "grad-clip", "clip": "grad-clip",
    "gradient-clipping": "grad-clip", "gradient-checkpointing": "checkpointing",
    "activation-checkpointing": "checkpointing", "precision": "dtype", "mixed-precision": "dtype",
    "model-name-or-path": "model", "model-name": "model", "model-config": "model", "config-name": "model",
    "tokenizer-name": "tokenizer", "dataset-name": "dataset", "data": "dataset", "data-dir": "dataset",
    "train-file": "dataset", "save-dir": "output-dir", "out": "output-dir", "out-dir": "output-dir",
    "output": "output-dir",
    "run-dir": "output-dir", "save-steps": "save-every", "save-interval": "save-every", "eval-steps": "eval-every",
    "eval-interval": "eval-every", "logging-steps": "log-every", "log-interval": "log-every",
    "save-total-limit": "keep", "resume-from-checkpoint": "resume", "resume-from": "resume", "optim": "optimizer",
    "random-seed": "seed", "wd": "weight-decay", "torch-compile": "compile", "layerwise": "per-layer",
    "wandb": "report-to", "pretrained": "init", "init-from": "init", "load": "init",
}  # fmt: skip
# What is said in another way here.
ELSEWHERE = {
    "device": "CUDA_VISIBLE_DEVICES chooses the GPU, ACCELERATE_USE_CPU=true the CPU",
    "gpu": "CUDA_VISIBLE_DEVICES chooses the GPU",
    "num-gpus": "torchrun or accelerate launch starts the processes",
    "epochs": "--max-steps counts updates",
    "num-train-epochs": "--max-steps counts updates",
    "bf16": "--dtype bf16",
    "fp16": "--dtype bf16; fp16 would need loss scaling",
    "fp32": "--dtype fp32",
    "rank": "--optimizer-args rank=128",
    "galore-rank": "--optimizer-args rank=128",
    "update-proj-gap": "--optimizer-args update_proj_gap=200",
    "galore-scale": "--optimizer-args scale=0.25",
    "proj-type": "--optimizer-args proj_type=std",
    "betas": "--optimizer-args betas=(0.9,0.95)",
    "beta1": "--optimizer-args betas=(0.9,0.95)",
    "eps": "--optimizer-args eps=1e-8",
    "momentum": "--optimizer-args momentum=0.9",
    "targets": "--optimizer-args targets=attn",
    "total-batch-size": "--batch-size times --accumulate",
    "scheduler": "the schedule is a warm-up and a cosine",
    "lr-scheduler": "the schedule is a warm-up and a cosine",
    "num-workers": "the data is read ahead by a thread",
    "trust-remote-code": "code from the hub is never run",
}


def parse_options(argv: Sequence[str] | None = None, *, prog: str = "lowrank-train", epilog: str = "") -> Options:
    """Options from defaults, then the YAML file of ``--config``, then the command line.

    Raises:
        UserError: an unknown flag or key (the nearest is named), a value of the wrong kind or out of range.
    """
    parser = Parser(
        prog=prog,
        description="Pretrain a causal language model with a low-rank optimizer. Without arguments: a 7M LLaMA on the "
        "text of the Python standard library, offline, in a few minutes on two CPU cores.",
        epilog=epilog,
        allow_abbrev=False,
    )
    add_flags(parser, FIELDS)
    given = parse_known(parser, argv, FIELDS)
    return check_ranges(Options(**read_values(given)))


def parse_known(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, names: Iterable[str]
) -> argparse.Namespace:
    """What a parser makes of a line.

    Raises:
        UserError: a flag that it does not have; what it may have meant is named.
    """
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise UserError(f"Invalid argument: {word!r}, expected options such as --model NAME{_meant(word, names)}")
        raise UserError(f"Invalid flag: {word}{_meant(word, names)}")
    return given


def _meant(word: str, names: Iterable[str]) -> str:
    """A hint at the flag that stands for a word, after the words of other programs, or at the nearest one."""
    flags = [_flag(name) for name in names]
    plain = word.lstrip("-").lower().replace("_", "-")
    meant = f"--{SYNONYMS.get(plain, plain)}"
    if meant in flags:
        return f"; did you mean {meant}?"
    if plain in ELSEWHERE:
        return f": {ELSEWHERE[plain]}"
    return nearest(word, flags) or HELP


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str], default: Mapping[str, Any] | None = None) -> None:
    """Give a parser the flags of some options; those that a line does not have stay out of its namespace.

    Args:
        parser: takes the flags.
        names: of the options.
        default: what the help text shows, where that is another default than that of :class:`Options`.
    """
    groups: dict[str, Any] = {}
    for name in names:
        field = FIELDS[name]
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, _ = _kind(name)
        text, shown = field.metadata["help"], (default or {}).get(name, field.default)
        if kind in (int, float, str) and shown is not None:
            text += f" [{shown}]"
        how: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            how |= {"nargs": "*", "metavar": "K=V"}
        elif field.metadata["choices"]:
            how["choices"] = field.metadata["choices"]
        else:
            how |= {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        groups[group].add_argument(_flag(name), **how)


def read_values(given: argparse.Namespace) -> dict[str, Any]:
    """The options of a line, on top of those of the YAML file that its ``--config`` names."""
    line = {name: value for name, value in vars(given).items() if name in FIELDS}
    return {**(read_yaml(line["config"]) if "config" in line else {}), **line}


def check_ranges(options: Options) -> Options:
    """The same options.

    Raises:
        UserError: a number out of range, or arguments of nothing.
    """
    for name in (*POSITIVE, *NOT_NEGATIVE, "lr"):
        value, least = getattr(options, name), int(name in POSITIVE)
        # Written so that NaN fails as well.
        if value is not None and not (least <= value < float("inf")):
            expected = "a positive number" if least else "a number that is not negative"
            raise UserError(f"Invalid {name}: {value}, expected {expected}")
    check_seed(options.seed)
    if options.parameterization_args and options.parameterization is None:
        raise UserError("Invalid --parameterization-args: they need --parameterization")
    return options


def check_seed(seed: int) -> None:
    """Raise UserError for what is no seed of torch."""
    if abs(seed) >= 2**63:
        raise UserError(f"Invalid seed: {seed}, expected less than 2^63")


def write_flags(options: Options, names: Iterable[str]) -> list[str]:
    """The words of a command line that gives these options, where they are not the defaults."""
    words: list[str] = []
    defaults = Options()
    for name in names:
        value = getattr(options, name)
        if value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(_flag(name) if value else _flag(f"no_{name}"))
        else:
            words += [_flag(name), *(value if isinstance(value, list) else [str(value)])]
    return words


def write_options(options: Options, path: Path) -> None:
    """Write the resolved options as YAML that ``--config`` reads back."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in TRANSIENT and v is not None}
    import yaml

    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(name: str) -> tuple[type, bool]:
    """``int``, ``float``, ``str``, ``bool`` or ``list`` of an option, and whether it may be None."""
    hint = HINTS[name]
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None)), True
    return (get_origin(hint) or hint), False


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file, or of one that comes with the package.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    import yaml

    shipped = CONFIGS / f"{Path(path).name.removesuffix('.yaml')}.yaml"
    if not Path(path).exists() and shipped.is_file():
        path = str(shipped)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise UserError(f"Invalid config: cannot read {path} ({error}), expected a file or one of {names}") from error
    # Brackets in brackets, numbers and dates out of range: not all are errors of its own.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"Invalid config: {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, Mapping):
        raise UserError(f"Invalid config: {path} is not a mapping of options")
    return dict(_convert(str(key), value, path) for key, value in values.items())


def _convert(key: str, value: Any, path: str) -> tuple[str, Any]:
    name = key.replace("-", "_")
    if name not in FIELDS or name == "config":
        plain = key.lower().replace("_", "-")
        meant = SYNONYMS.get(plain, "").replace("-", "_")
        near = f"; did you mean {meant}?" if meant else nearest(name, [n for n in FIELDS if n != "config"]) or HELP
        raise UserError(f"Invalid key in {path}: {key}{f': {ELSEWHERE[plain]}' if plain in ELSEWHERE else near}")
    kind, optional = _kind(name)
    choices = FIELDS[name].metadata["choices"]
    wrong = UserError(f"Invalid {name} in {path}: {value!r}, expected {choices or kind.__name__}")
    if value is None and optional:
        return name, None
    if kind is list:
        if isinstance(value, Mapping):
            return name, [f"{k}={v}" for k, v in value.items()]
        if not isinstance(value, list):
            raise wrong
        return name, [str(pair) for pair in value]
    # YAML 1.1 reads 1e-3 as a string and 10 as an int where a float is meant.
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return name, float(value)
        except ValueError:
            raise wrong from None
    if type(value) is not kind or (choices and value not in choices):
        raise wrong
    return name, value
