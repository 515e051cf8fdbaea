"""Bytes on each of many devices, for docs/scaling.md: ``python -m benchmarks.scaling [--simulate METHOD ...]``.

In closed form for every method, and for some by simulation: the first of N processes runs the real training step on
tensors without data. Writes ``results/scaling.json``; ``python -m benchmarks.table`` draws it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown, needed_result, write_result
from lowrank_optim.memory.devices import Devices, footprint
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.simulate_devices import simulate_sharded
from lowrank_optim.pretrain.llama import build_config

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN = "<!-- table:scaling -->"
# LLaMA-2 70B shares its keys and values among eight heads.
SEVENTY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"LLaMA-7B": "llama_7b", "LLaMA-13B": "llama_13b", "LLaMA-70B": ""}
NUMBERS = (8, 64, 512)
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "GaLoreAdamW": {},
    "GaLoreAdamW8bit": {},
    "FiraAdamW": {},
    "APOLLOAdamW": {},
    # Its default, a selection in every update, is for small models.
    "DCTAdamW": {"update_proj_gap": 200},
    "LDAdamW": {},
    "Trion": {},
    "GaLoreAdafactor": {},
    "Muon": {},
}
# Activations are as long as this; all else does not depend on it.
TOKENS = 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--simulate", nargs="*", default=["GaLoreAdamW"], choices=METHODS, metavar="METHOD")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SEVENTY), encoding="utf-8")
        rows = [
            row(model, path or folder, method, number, simulated=method in options.simulate)
            for model, path in MODELS.items()
            for method in METHODS
            for number in NUMBERS
        ]
    write_result("scaling", torch.device("cpu"), {"tokens": TOKENS, "rows": rows})


def row(model: str, path: str, method: str, number: int, *, simulated: bool) -> dict[str, Any]:
    """One method on one model and so many devices."""
    config = build_config(path)
    rank = {} if method in ("AdamW", "Muon") else {"rank": config.hidden_size // 4}
    job = Job(model=path, optimizer=method, optimizer_args={**METHODS[method], **rank}, seq_len=TOKENS)
    parts, copies = Devices(number, "fsdp"), Devices(number, "ddp")
    found = {"fsdp": footprint(job, parts), "ddp": footprint(job, copies)}
    figures: dict[str, Any] = {
        "stored": found["fsdp"].stored, "sent": found["fsdp"].sent(parts), "copies_stored": found["ddp"].stored,
        "copies_sent": found["ddp"].sent(copies), "low_rank_sent": found["ddp"].sent_at_low_rank(copies),
        "parts": asdict(found["fsdp"]),
    }  # fmt: skip
    if simulated:
        real = simulate_sharded(job, number, layers=config.num_hidden_layers)
        moved = real.model.plus(real.update).plus(real.refresh, 1 / found["fsdp"].gap)
        figures["simulated"] = {**asdict(real), "stored": real.peak, "sent": moved.sent(number)}
    print(model, method, number, {key: value for key, value in figures.items() if key != "parts"}, flush=True)
    return {"model": model, "method": method, "devices": number, "rank": rank.get("rank"), **figures}


def current() -> str:
    """The Markdown between the markers.

    Raises:
        ValueError: nothing was computed.
    """
    result = needed_result("scaling")
    return table(result)


def table(result: dict[str, Any]) -> str:
    """The tables of docs/scaling.md from what :func:`main` wrote."""
    rows = {(r["model"], r["method"], r["devices"]): r for r in result["rows"]}
    numbers = sorted({r["devices"] for r in result["rows"]})
    lines = []
    for model in dict.fromkeys(r["model"] for r in result["rows"]):
        first = next(r for r in result["rows"] if r["model"] == model and r["rank"])
        heads = ["method", "copies", "low-rank sums", *(f"{number} parts" for number in numbers)]
        table = []
        for method in dict.fromkeys(r["method"] for r in result["rows"]):
            one = rows[model, method, numbers[0]]
            cells = [_cell(one["copies_stored"], one["copies_sent"])]
            saves = one["low_rank_sent"] < one["copies_sent"]
            cells.append(f"{one['low_rank_sent'] / 1e9:.2f}" if saves else "–")
            parts = [rows[model, method, number] for number in numbers]
            cells += [_cell(part["stored"], part["sent"]) for part in parts]
            table.append([f"`{method}`", *cells])
        lines += [f"{model}, rank {first['rank']}:", "", markdown(heads, table), ""]
    lines.append("Stored / sent, GB a device; one micro-batch an update, refreshes in the mean. Copies: of 8 devices.")
    known = [r for r in result["rows"] if "simulated" in r]
    if known:
        off = [max(abs(r[key] / r["simulated"][key] - 1) for r in known) for key in ("stored", "sent")]
        methods = ", ".join(dict.fromkeys(r["method"] for r in known))
        lines.append(
            f"Formulas against {len(known)} simulations ({methods}): stored within {off[0]:.2%}, sent within "
            f"{off[1]:.2%}."
        )
    lines.append(f"Made by `{result['command']}` and `python -m benchmarks.table`.")
    return "\n".join(lines)


def _cell(stored: int, sent: int) -> str:
    return f"{stored / 1e9:.2f} / {sent / 1e9:.2f}"


if __name__ == "__main__":
    main()
