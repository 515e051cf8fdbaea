"""Continued pretraining: a pretrained model goes on with text of your own, as ``lowrank-train --init`` does it.

The pretrained model is a tiny one that learns from the first half of the documentation that comes with Python; the
other half is the new text. With a model of yours: lowrank-train --init NAME_OR_FOLDER --dataset FILE_OR_FOLDER.

    python examples/continued_pretraining.py [--steps 60] [--output-dir runs/python]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics

from transformers import LlamaConfig

from lowrank_optim.cli.main import main as lowrank_train


def continued(folder: Path, steps: int) -> int:
    """Train on one half, continue on the other; the exit status of the last command."""
    texts = [topics[key] for key in sorted(topics)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, half in (("old.txt", texts[::2]), ("new.txt", texts[1::2])):
        (folder / name).write_text("\n\n".join(half), encoding="utf-8")
    LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(folder / "config")
    common = f"--seq-len 64 --batch-size 8 --max-steps {steps} --eval-every {steps} --save-every {steps}".split()
    method = ["--optimizer", "GaLoreAdamW", "--optimizer-args", "rank=12", "update_proj_gap=20"]
    first = ["--model", str(folder / "config"), "--dataset", str(folder / "old.txt"), "--lr", "0.01"]
    status = lowrank_train([*first, *common, *method, "--output-dir", str(folder / "pretrained")])
    if status:
        return status
    pretrained = folder / "pretrained" / f"checkpoint-{steps}"
    second = ["--init", str(pretrained), "--tokenizer", str(pretrained), "--dataset", str(folder / "new.txt")]
    return lowrank_train([*second, "--lr", "0.003", *common, *method, "--output-dir", str(folder / "continued")])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/python"))
    options = parser.parse_args()
    sys.exit(continued(options.output_dir, options.steps))
