"""The figures of docs/gpu.md, drawn from the lines of ``results/gpu.jsonl``; part of ``benchmarks.table``.

What has no figure is left out, and named under the tables where it was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown
from benchmarks.gpu import record

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
BEGIN = "<!-- table:gpu -->"
SOURCE = RESULTS / record.FILE
NONE = "–"
Row = dict[str, Any]


def current(path: Path = SOURCE) -> str:
    """All tables, and what they are from.

    Raises:
        ValueError: there are no figures.
    """
    rows = record.read(path)
    found = [table for make in TABLES if (table := make(rows))]
    if not found:
        raise ValueError(f"Invalid results: no figures in {path.name}, run python -m benchmarks.gpu --out DIR")
    return "\n\n".join([*found, _caption(rows)])


def _of(rows: Sequence[Row], piece: str) -> list[Row]:
    """The lines of a piece with figures."""
    return [row for row in rows if row["piece"] == piece and row["name"] != record.WHOLE and "reason" not in row]


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return markdown(head, body) if body else ""


def _number(value: float | None, form: str = ".3g") -> str:
    return NONE if value is None else format(value, form)


def _gb(size: float | None) -> str:
    return NONE if size is None else f"{size / 1e9:.2f}"


def checks(rows: Sequence[Row]) -> str:
    """How many of the checks of a piece were right."""
    body = []
    for piece in ("check", "sanitizer", "tests"):
        judged = [row for row in _of(rows, piece) if "right" in row]
        wrong = [row["name"] for row in judged if not row["right"]]
        failed = [row["name"] for row in rows if row["piece"] == piece and "reason" in row]
        if judged or failed:
            right = f"{len(judged) - len(wrong)} of {len(judged) + len(failed)}"
            body.append([piece, right, ", ".join([*wrong, *failed]) or "none"])
    return _markdown(("checked", "right", "not right"), body)


def memory(rows: Sequence[Row]) -> str:
    body = [
        [
            f"`{row['method']}`, {row['weights']} weights", f"{row['card_gb']} GB", _gb(row.get("simulated_bytes")),
            _gb(row["allocated_bytes"]), _gb(row.get("reserved_bytes")), _gb(row.get("process_bytes")),
            _number(row["tokens_s"], ",.0f"),
        ]
        for row in _of(rows, "memory")
    ]  # fmt: skip
    head = ("LLaMA-7B", "card", "simulated, GB", "allocated", "reserved", "the process", "tokens/s")
    return _markdown(head, body)


def steps(rows: Sequence[Row]) -> str:
    found = _of(rows, "steps")
    full = {(row["model"], row["whole"]): row["ms"] for row in found if row["rank"] == 0 and "bfloat16" in row["dtype"]}
    body = []
    for row in found:
        adamw = full.get((row["model"], row["whole"]))
        body.append(
            [
                row["name"], _number(row["ms"]), _number(row.get("replayed_ms")), _number(row["host_ms"]),
                _number(row.get("refresh_share"), ".1%") if "refresh_share" in row else NONE,
                _number(row["ms"] / adamw if adamw else None, ".2f"),
            ]
        )  # fmt: skip
    head = ("step", "launched, ms", "replayed", "on the host", f"refresh over {_gap()} steps", "/ AdamW fused, bf16")
    return _markdown(head, body)


def _gap() -> int:
    from benchmarks.kernel_steps import GAP

    return GAP


def throughput(rows: Sequence[Row]) -> str:
    body = [
        [
            row["name"], _number(row["tokens_s"], ",.0f"), _number(row.get("mfu"), ".1%"),
            _number(row.get("share_of_measured_product"), ".1%"),
        ]
        for row in _of(rows, "throughput")
    ]  # fmt: skip
    return _markdown(("`train_llama.py`", "tokens/s", "MFU", "of the measured bf16 product"), body)


def kernels(rows: Sequence[Row]) -> str:
    body = [
        [row["name"], _number(1e3 * row["ms"]), _number(1e3 * row["eager_ms"]), f"{row['share']:.0%}"]
        for row in _of(rows, "kernels")
        if "share" in row
    ]
    return _markdown(("kernel", "µs", "eager, µs", "of what bytes and FLOPs allow"), body)


def converge(rows: Sequence[Row]) -> str:
    body = [
        [
            f"`{row['optimizer']}`",
            _number(row["lr"]),
            str(row["updates"]),
            f"{row['loss']:.3f}",
            f"{row['tokens_s']:,.0f}",
        ]
        for row in _of(rows, "converge")
    ]
    return _markdown(("LLaMA-60M", "learning rate", "updates", "validation loss", "tokens/s"), body)


def peers(rows: Sequence[Row]) -> str:
    body = [
        [row["name"], _number(row["ms"]), _number(row["host_ms"]), _gb(row.get("state_bytes"))]
        for row in _of(rows, "peers")
    ]
    return _markdown(("a layer of LLaMA-7B, rank 256", "step, ms", "on the host", "state, GB"), body)


TABLES: tuple[Callable[[Sequence[Row]], str], ...] = (checks, memory, steps, throughput, kernels, converge, peers)


def _caption(rows: Sequence[Row]) -> str:
    devices = sorted({row["device"] for row in rows if row["device"] != "unknown"})
    limits = {row["name"]: row for row in _of(rows, "limits")}
    found = limits.get("versions", {}).get("versions", {})
    lines = [", ".join([*devices, *(f"{name} {found[name]}" for name in ("torch", "triton") if name in found)])]
    if "copy 1024 MiB" in limits and "product bf16" in limits:
        copied, product = limits["copy 1024 MiB"]["tb_s"], limits["product bf16"]["tflop_s"]
        lines[0] += f"; a copy moves {copied:.2f} TB/s, a bf16 product does {product:.0f} TFLOP/s"
    failed = [row for row in rows if "reason" in row and row["piece"] not in ("check", "sanitizer", "tests")]
    missing = [f"{row['piece']}, {row['name']}" for row in failed if row["name"] != record.WHOLE]
    if missing:
        lines.append(f"Without a figure: {'; '.join(missing)}.")
    lines.append(
        "Medians. Made by `python -m benchmarks.gpu --out DIR` (docs/gpu.md) and `python -m benchmarks.table`."
    )
    return "\n".join([f"{lines[0]}.", *lines[1:]])
