"""Checkpoints of a release, to be loaded for ever: ``python tests/golden/make_checkpoints.py VERSION`` in its checkout.

Then commit ``tests/golden/checkpoints/VERSION``; ``tests/pretrain/test_formats.py`` continues each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "checkpoints"
RUN = (
    "--dataset data --no-pack --model model.json --seq-len 16 --batch-size 2 --max-steps 3 --save-every 0"
    " --eval-every 0 --eval-batches 1 --warmup-steps 0 --sample-tokens 0 --lr 0.01"
)

if __name__ == "__main__":
    version = sys.argv[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    for name, more in json.loads((GOLDEN / "runs.json").read_text()).items():
        # A relative path: it is saved as well.
        out = f"{version}/{name}"
        line = [sys.executable, str(ROOT / "train_llama.py"), *RUN.split(), *more, "--output-dir", out]
        subprocess.run(line, cwd=GOLDEN, env=environment, check=True)
        for path in (GOLDEN / out).iterdir():
            if not path.is_dir():
                path.unlink()
