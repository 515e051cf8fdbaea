"""The options of a run, declared once: command line, YAML file, help text and resolved copy all come from here."""

# ruff: noqa: RUF009
# option() returns a dataclass field, which the rule against calls in defaults cannot see.
from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

# Parameterizations that are not trained with AdamW.
OPTIMIZER_OF = {"loro": "LOROAdamW", "sst": "SSTAdamW"}


class UserError(Exception):
    """Something that the person at the keyboard can correct: one clear line and exit status 2, no traceback."""


@contextmanager
def user_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn the ``ValueError`` and ``RuntimeError`` of set-up code (and ``more``) into one :class:`UserError`."""
    kinds: tuple[type[Exception], ...] = (ValueError, RuntimeError, *more)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(" ".join(str(error).split())) from error


def option(default: Any, group: str, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"group": group, "help": help, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Options:
    """Every option; ``None`` means "the published value for this model and method", see ``recipes.py``."""

    dataset: str = option(
        "stdlib",
        "data",
        "stdlib (the Python standard library's own text, offline), c4 (allenai/c4 en, streamed), a hub name "
        "NAME[:CONFIG], or a folder or file of .json.gz, .jsonl, .json or .txt[.gz] shards",
    )
    tokenizer: str | None = option(
        None,
        "data",
        "name or folder for AutoTokenizer; default: t5-base for hub data, otherwise a byte-level BPE of 8192 "
        "pieces trained on the data and cached",
    )
    seq_len: int | None = option(None, "data", "tokens a sequence (published: 256)")
    pack: bool = option(
        False, "data", "join documents and cut them, instead of truncating each and padding it on the right"
    )
    model: str = option("llama_tiny", "model", "a preset (llama_9m … llama_13b) or a LLaMA config.json")
    dtype: str = option(
        "fp32", "model", "fp32, or bf16 for pure bf16 weights and gradients as published", ("fp32", "bf16")
    )
    weights: str | None = option(
        None,
        "model",
        "int8 for the attention and MLP matrices as codes with an fp32 scale for every 256 values, rounded "
        "stochastically at an update (an optimizer of lowrank_optim only); default: as --dtype",
        ("bf16", "int8"),
    )
    parameterization: str | None = option(
        None,
        "model",
        "replace the attention and MLP matrices: sltrain, lost, sst, lowrank, cola, lora, relora or loro",
    )
    parameterization_args: list[str] = option(
        [],
        "model",
        "its options as k=v pairs, e.g. rank=128 sparsity=0.03; what is not given takes the published value",
    )
    checkpointing: bool = option(False, "model", "recompute activations in the backward pass")
    checkpoint_every: int = option(1, "model", "with --checkpointing: of every n-th layer only, the others keep theirs")
    chunked_loss: bool = option(
        True, "model", "head and loss of 512 tokens at a time, never all logits; up to 8 %% slower at 60M, less above"
    )
    compile: bool = option(False, "model", "torch.compile the model")
    optimizer: str = option(
        "auto",
        "optimizer",
        "a class of lowrank_optim, torch.optim or bitsandbytes.optim; auto: GaLoreAdamW, or the one that "
        "--parameterization was published with",
    )
    optimizer_args: list[str] = option(
        [], "optimizer", "its keyword arguments as k=v pairs, e.g. rank=128 update_proj_gap=200"
    )
    lr: float | None = option(None, "optimizer", "peak learning rate")
    weight_decay: float | None = option(None, "optimizer", "decoupled weight decay (published: 0)")
    warmup_steps: int | None = option(None, "optimizer", "updates of linear warm-up; default 10 %% of the run")
    grad_clip: float | None = option(
        None,
        "optimizer",
        "largest gradient norm, 0 = no clipping; with --per-layer that of the update before or of the parameter "
        "itself, whichever is larger, stands for it",
    )
    per_layer: bool = option(
        False,
        "optimizer",
        "update each parameter within the backward pass and free its gradient at once; --accumulate then sums "
        "low-rank gradients where the method allows (step_in_backward; an optimizer of lowrank_optim only)",
    )
    restarts: str | None = option(
        None,
        "optimizer",
        "act every so many updates: reset (moments), refactorize (B A evenly, and reset) or merge (ReLoRA); "
        "default: what --parameterization was published with",
        ("none", "reset", "refactorize", "merge"),
    )
    restart_args: list[str] = option([], "optimizer", "k=v pairs, e.g. every=200 ramp=10 scope=all")
    max_steps: int | None = option(None, "run", "updates; the cosine reaches 10 %% of the peak at the last")
    batch_size: int | None = option(None, "run", "sequences a micro-batch and process")
    accumulate: int | None = option(
        None,
        "run",
        "micro-batches an update; default 1 beside --batch-size, otherwise what the published total needs",
    )
    accumulate_dtype: str = option(
        "fp32",
        "run",
        "of low-rank sums over micro-batches (--per-layer); bf16 is rounded stochastically",
        ("fp32", "bf16"),
    )
    seed: int = option(0, "run", "of the weights and of the data order")
    eval_every: int | None = option(None, "evaluation", "updates between evaluations, 0 = first and last only")
    eval_batches: int | None = option(None, "evaluation", "validation micro-batches, 0 = the whole split")
    legacy_eval: bool = option(
        False,
        "evaluation",
        "a mean of batch means divided by n+1, as the published harness does, to compare with papers",
    )
    save_every: int | None = option(None, "saving", "updates between checkpoints, 0 = only the last")
    keep: int = option(2, "saving", "checkpoints kept, 0 = all")
    output_dir: str | None = option(None, "saving", "default runs/<time>-<model>-<optimizer>")
    resume: str | None = option(
        None,
        "saving",
        "auto (the newest checkpoint in --output-dir, or a fresh start) or a checkpoint's path",
    )
    log_every: int = option(10, "report", "updates between log lines; metrics.jsonl gets every update")
    report_to: str = option(
        "none",
        "report",
        "also log there; W&B runs offline unless WANDB_MODE says otherwise",
        ("none", "tensorboard", "wandb"),
    )
    sample_prompt: str | None = option(None, "report", "prompt of the sample generated at the end")
    sample_tokens: int = option(64, "report", "length of that sample, 0 = none")
    config: str | None = option(None, "general", "YAML file with any of these options; the line overrides it")
    dry_run: bool = option(False, "general", "print plan and memory prediction, then stop; writes nothing")

    def __post_init__(self) -> None:
        if self.parameterization is not None:
            self.parameterization = self.parameterization.lower()
        if self.optimizer == "auto":
            dense = self.parameterization is None
            self.optimizer = "GaLoreAdamW" if dense else OPTIMIZER_OF.get(str(self.parameterization), "AdamW")


@dataclasses.dataclass(kw_only=True)
class Resolved(Options):
    """Options with every published value filled in, see :func:`lowrank_optim.pretrain.recipes.resolve`."""

    seq_len: int
    warmup_steps: int
    grad_clip: float
    max_steps: int
    batch_size: int
    accumulate: int
    eval_every: int
    eval_batches: int
    save_every: int
    restarts: str


FIELDS = {field.name: field for field in dataclasses.fields(Options)}
HINTS = get_type_hints(Options)
# What belongs to one invocation and not to the run that it describes.
TRANSIENT = ("config", "resume", "dry_run")
POSITIVE = ("checkpoint_every", "seq_len", "batch_size", "accumulate", "max_steps", "log_every")
NOT_NEGATIVE = (
    *("weight_decay", "warmup_steps", "grad_clip", "seed", "eval_every", "eval_batches", "save_every"),
    *("keep", "sample_tokens"),
)


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from defaults, then the YAML file of ``--config``, then the command line.

    Raises:
        UserError: an unknown flag or key (the nearest is named), a value of the wrong kind or out of range.
    """
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in FIELDS]
        raise UserError(f"Invalid flag: {unknown[0]}{_nearest(unknown[0].split('=')[0], flags)}")
    line = vars(given)
    values = _read_yaml(line["config"]) if "config" in line else {}
    options = Options(**{**values, **line})
    for name in (*POSITIVE, *NOT_NEGATIVE, "lr"):
        value, least = getattr(options, name), int(name in POSITIVE)
        # Written so that NaN fails as well.
        if value is not None and not (least <= value < float("inf")):
            expected = "a positive number" if least else "a number that is not negative"
            raise UserError(f"Invalid {name}: {value}, expected {expected}")
    return options


def write_options(options: Options, path: Path) -> None:
    """Write the resolved options as YAML that ``--config`` reads back."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in TRANSIENT and v is not None}
    path.write_text(_yaml().safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="train_llama.py",
        description="Pretrain a LLaMA with a low-rank optimizer. Without arguments: a 7M model on the text of "
        "the Python standard library, offline, in a few minutes on two CPU cores.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for field in FIELDS.values():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, optional = _kind(field.name)
        text = field.metadata["help"]
        if not optional and kind is not bool and field.default not in (None, dataclasses.MISSING):
            text += f" [{field.default}]"
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            groups[group].add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind is list:
            groups[group].add_argument(flag, nargs="*", metavar="K=V", help=text)
        else:
            metavar = None if field.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind]
            choices = field.metadata["choices"]
            groups[group].add_argument(flag, type=kind, choices=choices, metavar=metavar, help=text)
    return parser


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
    except yaml.YAMLError as error:
        raise UserError(f"Invalid config: {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, Mapping):
        raise UserError(f"Invalid config: {path} holds no mapping of options")
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


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; --help lists the options"


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError("YAML files need PyYAML: pip install 'lowrank-optim[train]'") from error
    return yaml
