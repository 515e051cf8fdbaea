"""The README's tables: LLaMA-7B's peak with AdamW, 8-bit AdamW and ours, a small model's loss, and the first choices.

``python -m benchmarks.front_table`` simulates the two baselines and the three settings that come with the package,
counts the states of the six choices, and writes ``results/front_table.json``. Our rows of peaks come from
``benchmarks.memory_7b``, what a card allocated from ``benchmarks.gpu``, perplexities from ``benchmarks.converge``;
``benchmarks.table`` draws the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import converge_table
from benchmarks.common import RESULTS, markdown, needed_result, read_result, write_result
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import MEMORY_OPTIONS, Job
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.pretrain.command_line import read_yaml

BEGIN = "<!-- table:front -->"
BEGIN_CHOICES = "<!-- table:choices -->"
BEGIN_SETTINGS = "<!-- table:settings -->"
MODEL = "llama_7b"
BASELINES = {"AdamW": "`torch.optim.AdamW`", "AdamW8bit": "`bitsandbytes.optim.AdamW8bit`"}
# What the convergence runs call the optimizers of the table.
TRAINED = {
    **{"AdamW": "AdamW", "AdamW8bit": "8-bit AdamW", "GaLoreAdamW8bit": "GaLore", "QGaLoreAdamW8bit": "Q-GaLore"},
    **{"DCTAdamW": "DCT", "APOLLOMini": "APOLLO-Mini"},
}
CONTROL = "low rank"
SETTINGS = ("llama_7b_24gb", "llama_7b_16gb", "llama_7b_12gb")
PARTS = ("weights", "gradients", "optimizer")
# What is wanted, the class, its arguments in the column of memory, and what it costs.
CHOICES: tuple[tuple[str, str, Mapping[str, Any], str], ...] = (
    ("to begin with", "GaLoreAdamW", {"rank": 1024}, "a refresh every 200 updates"),
    ("a third of that state", "GaLoreAdamW8bit", {"rank": 1024}, "moments in 8 bits"),
    ("int8 weights as well, 7B on 16 GB", "QGaLoreAdamW8bit", {"rank": 1024}, "weights rounded at random"),
    ("7B on 12 GB", "DCTAdamW", {"rank": 256, "state_dtype": "int8"}, "the highest perplexity above"),
    ("updates of full rank", "FiraAdamW", {"rank": 1024}, "sums whole gradients under accumulation"),
    ("next to no state", "APOLLOMini", {}, "sums whole gradients under accumulation"),
)


def baseline(optimizer: str) -> Job:
    """A baseline in the setting of ``benchmarks.memory_7b``, whose gradients all live until the step."""
    return Job(model=MODEL, optimizer=optimizer, seq_len=2048, checkpointing=True)


def setting(name: str) -> Job:
    """One of the settings that come with the package, with its micro-batches."""
    return Job(**{key: value for key, value in read_yaml(name).items() if key in MEMORY_OPTIONS})


def choice(name: str, args: Mapping[str, Any]) -> Job:
    """A first choice at 7B, whose state is counted."""
    return Job(model=MODEL, optimizer=name, optimizer_args=args)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate every job."""
    jobs = {name: baseline(name) for name in BASELINES} | {name: setting(name) for name in SETTINGS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front_table", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=jobs, metavar="NAME", help=f"only these of {', '.join(jobs)}")
    only = parser.parse_args(argv).only or list(jobs)
    torch.set_num_threads(1)
    states = {name: estimate(choice(name, args)).by_category["optimizer"] for _, name, args, _ in CHOICES}
    peaks: dict[str, Any] = dict((read_result("front_table") or {"peaks": {}})["peaks"])
    for name in only:
        peak = simulate(jobs[name])
        peaks[name] = {"method": jobs[name].method, "setting": jobs[name].setting, **asdict(peak)}
        # Which layer takes how much is of no use here.
        del peaks[name]["by_layer"]
        print(f"{name}, {jobs[name].method}: {peak.peak_bytes / 1e9:.2f} GB", flush=True)
        write_result("front_table", torch.device("cpu"), {"peaks": peaks, "states": states})


def current() -> str:
    """The table of peaks."""
    front, ours, measured = needed_result("front_table"), needed_result("memory_7b"), on_a_card()
    trained, setup = converge_table.perplexities([*TRAINED.values(), CONTROL])
    rows = [
        [text, "bf16", *_sizes(front["peaks"][name]), "–", f"{trained[TRAINED[name]]:.1f}"]
        for name, text in BASELINES.items()
    ]
    for row in ours["rows"]:
        if row["model"] == MODEL:
            allocated = measured.get((row["method"], row["weights"]), "–")
            # No run has weights in int4.
            loss = "–" if row["weights"] == "int4" else f"{trained[TRAINED[row['method'].partition('(')[0]]]:.1f}"
            rows.append([f"`{row['method']}`", row["weights"], *_sizes(row), allocated, loss])
    header = ("LLaMA-7B with", "weights in", "peak, GB", *PARTS, "on a card", "perplexity")
    caption = (
        "Simulated peaks of 1 × 2048 tokens with recomputed activations; ours update each matrix in the backward pass. "
        "On a card: what an H200\nlimited to 24, 16 or 12 GB allocated. Perplexity: on C4, "
        f"{setup}, which says little\nabout 7B; states of GaLore, DCT and APOLLO in fp32 there, plain low-rank factors "
        f"{trained[CONTROL]:.1f}.\n[All methods and seeds](docs/choosing.md); [more on the peaks](docs/memory.md#7b)."
    )
    return f"{markdown(header, rows, range(2, len(header)))}\n\n{caption}"


def choices() -> str:
    """The six first choices, with the bytes of state by the planner's count."""
    states = needed_result("front_table")["states"]
    rows = []
    for wish, name, args, cost in CHOICES:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        rows.append([wish, f"`{name}({given})`", f"{states[name] / 1e9:.1f}", cost])
    return markdown(("you want", "take", "state at 7B, GB", "what it costs"), rows, {2})


def settings() -> str:
    """The settings that come with the package, with the peak of the whole job."""
    front = needed_result("front_table")
    rows = []
    for name in SETTINGS:
        job, peak = setting(name), front["peaks"].get(name)
        card = name.removeprefix("llama_7b_").removesuffix("gb")
        tokens = f"{job.accumulate} × {job.batch_size} × {job.seq_len}"
        size = "–" if peak is None else f"{peak['peak_bytes'] / 1e9:.1f} ({peak['peak_bytes'] / 2**30:.1f} GiB)"
        rows.append([f"{card} GB", f"`{name}`", f"`{job.optimizer}`", job.weights or job.dtype, tokens, size])
    header = ("card", "setting", "optimizer", "weights in", "tokens per update", "simulated peak, GB")
    caption = "Made by `python -m benchmarks.front_table` and `python -m benchmarks.table`."
    return f"{markdown(header, rows, {4, 5})}\n\n{caption}"


def on_a_card() -> dict[tuple[str, str], str]:
    """What each 7B job allocated on the GPU of ``results/gpu.jsonl``, by method and weights, in GB."""
    found = {}
    for line in (RESULTS / "gpu.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["piece"] == "memory" and "allocated_bytes" in row:
            found[row["method"], row["weights"]] = f"{row['allocated_bytes'] / 1e9:.2f}"
    return found


def _sizes(row: Mapping[str, Any]) -> list[str]:
    sizes = [row["peak_bytes"], *(row["by_category"][part] for part in PARTS)]
    return [f"{size / 1e9:.2f}" for size in sizes]


if __name__ == "__main__":
    main()
