"""From the fields of :class:`Options` to flags and YAML, and back."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from lowrank_optim.pretrain.config import Options, UserError

FIELDS = {field.name: field for field in dataclasses.fields(Options)}
HINTS = get_type_hints(Options)
# What belongs to one invocation and not to the run that it describes.
TRANSIENT = ("config", "resume", "dry_run", "allow_changed_data")
POSITIVE = ("checkpoint_every", "seq_len", "batch_size", "accumulate", "max_steps", "log_every")
NOT_NEGATIVE = (
    *("weight_decay", "warmup_steps", "grad_clip", "seed", "eval_every", "eval_batches", "save_every"),
    *("keep", "sample_tokens", "max_bad_documents", "max_time", "loss_limit"),
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are :class:`UserError`, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from defaults, then the YAML file of ``--config``, then the command line.

    Raises:
        UserError: an unknown flag or key (the nearest is named), a value of the wrong kind or out of range.
    """
    parser = Parser(
        prog="train_llama.py",
        description="Pretrain a LLaMA with a low-rank optimizer. Without arguments: a 7M model on the text of "
        "the Python standard library, offline, in a few minutes on two CPU cores.",
        allow_abbrev=False,
    )
    add_flags(parser, FIELDS)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"Invalid flag: {unknown[0]}{_nearest(unknown[0].split('=')[0], map(_flag, FIELDS))}")
    return check_ranges(Options(**read_values(given)))


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
    return {**(_read_yaml(line["config"]) if "config" in line else {}), **line}


def check_ranges(options: Options) -> Options:
    """The same options.

    Raises:
        UserError: a number out of range.
    """
    for name in (*POSITIVE, *NOT_NEGATIVE, "lr"):
        value, least = getattr(options, name), int(name in POSITIVE)
        # Written so that NaN fails as well.
        if value is not None and not (least <= value < float("inf")):
            expected = "a positive number" if least else "a number that is not negative"
            raise UserError(f"Invalid {name}: {value}, expected {expected}")
    return options


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
    path.write_text(_yaml().safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(name: str) -> tuple[type, bool]:
    """``int``, ``float``, ``str``, ``bool`` or ``list`` of an option, and whether it may be None."""
    hint = HINTS[name]
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None)), True
    return (get_origin(hint) or hint), False


def _read_yaml(path: str) -> dict[str, Any]:
    yaml = _yaml()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Invalid config: cannot read {path} ({error})") from error
    # Brackets in brackets, numbers and dates out of range: not all are errors of its own.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"Invalid config: {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, Mapping):
        raise UserError(f"Invalid config: {path} is not a mapping of options")
    return dict(_convert(str(key), value, path) for key, value in values.items())


def _convert(key: str, value: Any, path: str) -> tuple[str, Any]:
    name = key.replace("-", "_")
    if name not in FIELDS or name == "config":
        raise UserError(f"Invalid key in {path}: {key}{_nearest(name, [n for n in FIELDS if n != 'config'])}")
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


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; --help lists the options"


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError("YAML files need PyYAML: pip install 'lowrank-optim[train]'") from error
    return yaml
