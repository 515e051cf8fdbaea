"""The options of a run, declared once: command lines, YAML file, help text and resolved copy all come from here."""

# ruff: noqa: RUF009
# option() returns a dataclass field, which the rule against calls in defaults cannot see.
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Parameterizations with an optimizer of their own; the others are trained with AdamW.
OPTIMIZER_OF = {"loro": "LOROAdamW", "sst": "SSTAdamW"}
# Weights that are stored in fewer bits than bf16, and in how many.
QUANTIZED = {"int8": 8, "int4": 4}


class UserError(Exception):
    """Something that the person at the keyboard can correct: one clear line and exit status 2, no traceback."""


def line_of(error: BaseException) -> str:
    """Kind and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def missing(error: ModuleNotFoundError) -> UserError:
    """What to say of a package that is not installed; one of our own is a fault of ours."""
    if str(error.name).startswith("lowrank_"):
        raise error
    return UserError(f"{error.name} is not installed: pip install 'lowrank-optim[train]'")


@contextmanager
def user_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn the ``ValueError`` and ``RuntimeError`` of set-up code (and ``more``) into one :class:`UserError`."""
    kinds: tuple[type[Exception], ...] = (ValueError, RuntimeError, *more)
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise missing(error) from error
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
        "NAME[:CONFIG], a file or folder of .txt, .md, .jsonl, .json (each also as .gz or .zst), .parquet or .arrow, "
        "or a folder that lowrank-train tokenize wrote; files and folders named train, validation or test are those "
        "splits",
    )
    text_field: str = option("text", "data", "entry of a JSON object or table row that holds its text")
    tokenizer: str | None = option(
        None,
        "data",
        "name or folder for AutoTokenizer; default: t5-base for hub data, otherwise a byte-level BPE with 8192 "
        "tokens, trained on the data and cached",
    )
    seq_len: int | None = option(None, "data", "tokens per sequence (published: 256)")
    pack: bool | None = option(
        None,
        "data",
        "concatenate documents and cut the stream into sequences, instead of truncating and padding each document, as "
        "published; default: yes, except for text of the hub",
    )
    max_bad_documents: int = option(
        10,
        "data",
        "how many broken lines or unreadable documents to skip, with a warning each, in one pass over the text; one "
        "more, and the run saves and stops",
    )
    allow_changed_data: bool = option(
        False, "data", "resume although text files were added, removed or changed; the changes are listed"
    )
    model: str = option(
        "llama_tiny",
        "model",
        "a preset (llama_9m … llama_13b), or a causal language model of transformers: a config.json, its folder, "
        "or the name of one on the hub",
    )
    init: str | None = option(
        None,
        "model",
        "start from the pretrained weights of a folder or of a hub name; --model, if not given, is the same",
    )
    dtype: str = option(
        "fp32", "model", "dtype of weights, gradients and activations; the papers train in pure bf16", ("fp32", "bf16")
    )
    weights: str | None = option(
        None,
        "model",
        "int8, int4: store the attention and MLP matrices as codes with one fp32 scale per 256 or 128 values, rounded "
        "stochastically in each update (lowrank_optim optimizers only); int4 trains worse; default: same as --dtype",
        ("bf16", *QUANTIZED),
    )
    parameterization: str | None = option(
        None,
        "model",
        "replace the attention and MLP matrices: sltrain, lost, sst, lowrank, cola, lora, relora, loro, maestro or "
        "ternarylowrank",
    )
    parameterization_args: list[str] = option(
        [],
        "model",
        "options of the parameterization, e.g. rank=128 sparsity=0.03; the rest are as published for the model size",
    )
    ranks: str | None = option(
        None,
        "model",
        "a JSON file with the rank of every low-rank matrix, of the optimizer or the parameterization, by the name of "
        "its weight; python -m lowrank_optim.pretrain.ranks --rank-budget R --out FILE makes one from gradients",
    )
    checkpointing: bool = option(False, "model", "recompute activations in the backward pass to save memory")
    checkpoint_every: int = option(1, "model", "with --checkpointing: recompute only every N-th layer")
    chunked_loss: bool = option(
        True,
        "model",
        "compute output head and loss 512 tokens at a time, so that the full logits never exist; up to 8 %% slower "
        "at 60M parameters, less for larger models",
    )
    compile: bool = option(False, "model", "torch.compile the model")
    optimizer: str = option(
        "auto",
        "optimizer",
        "a class of lowrank_optim, torch.optim or bitsandbytes.optim; auto: GaLoreAdamW, or the one that "
        "--parameterization was published with",
    )
    optimizer_args: list[str] = option(
        [], "optimizer", "keyword arguments of the optimizer, e.g. rank=128 update_proj_gap=200"
    )
    lr: float | None = option(None, "optimizer", "peak learning rate")
    weight_decay: float | None = option(None, "optimizer", "decoupled weight decay (published: 0)")
    warmup_steps: int | None = option(None, "optimizer", "updates of linear warm-up; default: 10 %% of the run")
    grad_clip: float | None = option(
        None,
        "optimizer",
        "clip the gradient norm to this value, 0 = no clipping; with --per-layer the norm is estimated: that of the "
        "previous update or of the parameter itself, whichever is larger",
    )
    per_layer: bool = option(
        False,
        "optimizer",
        "update each parameter during the backward pass and free its gradient at once; --accumulate then sums "
        "low-rank gradients where the method allows it (lowrank_optim optimizers only)",
    )
    graph_step: bool = option(
        False,
        "optimizer",
        "on CUDA: record the optimizer's step in a graph and replay it between refreshes, so that the host launches it "
        "in one call; gradients then stay allocated (lowrank_optim optimizers only; not tried on a GPU so far)",
    )
    restarts: str | None = option(
        None,
        "optimizer",
        "periodically reset the optimizer's moments (reset), rebalance the factors B A and reset (refactorize), "
        "merge them into the weight (merge, as ReLoRA), or draw widths of the factors and cut their ranks (dropout, "
        "as Maestro); default: as published for the parameterization",
        ("none", "reset", "refactorize", "merge", "dropout"),
    )
    restart_args: list[str] = option([], "optimizer", "arguments of the restarts, e.g. every=200 ramp=10 scope=all")
    max_steps: int | None = option(
        None, "run", "number of updates; the cosine schedule ends at 10 %% of the peak learning rate"
    )
    batch_size: int | None = option(None, "run", "sequences per micro-batch and process")
    accumulate: int | None = option(
        None,
        "run",
        "micro-batches per update (gradient accumulation); default: 1 if --batch-size is given, otherwise enough for "
        "the published batch",
    )
    accumulate_dtype: str = option(
        "fp32",
        "run",
        "dtype of the low-rank gradient sums that --per-layer keeps; bf16 is rounded stochastically",
        ("fp32", "bf16"),
    )
    seed: int = option(0, "run", "random seed for weights and data order")
    eval_every: int | None = option(
        None, "evaluation", "updates between evaluations, 0 = only before the first and after the last"
    )
    eval_batches: int | None = option(None, "evaluation", "validation micro-batches, 0 = the whole split")
    legacy_eval: bool = option(
        False,
        "evaluation",
        "sum the mean losses of n batches and divide by n + 1, as the published harness does, to compare with papers",
    )
    save_every: int | None = option(None, "saving", "updates between checkpoints, 0 = only at the end")
    keep: int = option(2, "saving", "number of checkpoints to keep, 0 = all")
    output_dir: str | None = option(None, "saving", "default: runs/<time>-<model>-<optimizer>")
    resume: str | None = option(
        None,
        "saving",
        "auto (newest checkpoint in --output-dir, or a fresh start) or the path of a checkpoint",
    )
    verify: bool = option(
        True, "saving", "check a checkpoint against its digests before resuming from it (0.1 s per GB)"
    )
    max_time: float | None = option(
        None,
        "saving",
        "minutes after which the run saves and exits with status 75, to be resumed later; default: no limit",
    )
    fsdp: bool = option(
        False,
        "processes",
        "split weights, gradients and optimizer state over the processes that torchrun starts (FSDP2), instead of a "
        "copy in each; a checkpoint goes on with and without",
    )
    process_timeout: float = option(
        30.0,
        "processes",
        "seconds without a sign of life after which a process counts as lost, and the run ends to be resumed, on fewer "
        "processes too; 0 = wait for ever",
    )
    loss_limit: float = option(
        2.0,
        "run",
        "after 10 updates in a row whose loss or gradient is not finite, or whose loss exceeds this multiple of its "
        "running median, return once to the last good checkpoint and continue with later data; 0 = only if not finite",
    )
    log_every: int = option(10, "report", "updates between log lines; metrics.jsonl records every update")
    report_to: str = option(
        "none",
        "report",
        "also log to this service; W&B runs offline unless WANDB_MODE says otherwise",
        ("none", "tensorboard", "wandb"),
    )
    sample_prompt: str | None = option(None, "report", "prompt for the text sampled after training")
    sample_tokens: int = option(64, "report", "number of tokens to sample, 0 = none")
    config: str | None = option(
        None,
        "general",
        "YAML file with any of these options, or the name of one that ships with the package, such as llama_7b_24gb; "
        "the command line overrides it",
    )
    dry_run: bool = option(
        False, "general", "print what would be trained and its predicted memory, then stop; writes nothing"
    )

    def __post_init__(self) -> None:
        if self.init is not None:
            # Its architecture and its tokenizer, unless others are given.
            self.model = self.init if self.model == "llama_tiny" else self.model
            self.tokenizer = self.tokenizer or self.init
        if self.parameterization is not None:
            self.parameterization = self.parameterization.lower()
        if self.optimizer == "auto":
            dense = self.parameterization is None
            self.optimizer = "GaLoreAdamW" if dense else OPTIMIZER_OF.get(str(self.parameterization), "AdamW")


@dataclasses.dataclass(kw_only=True)
class Resolved(Options):
    """Options with every published value filled in, see :func:`lowrank_optim.pretrain.recipes.resolve`."""

    seq_len: int
    pack: bool
    warmup_steps: int
    grad_clip: float
    max_steps: int
    batch_size: int
    accumulate: int
    eval_every: int
    eval_batches: int
    save_every: int
    restarts: str
