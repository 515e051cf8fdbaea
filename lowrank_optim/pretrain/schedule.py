"""Learning-rate schedule of the C4 experiments: linear warm-up, then a cosine to 10 % of the peak."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FLOOR = 0.1


def factor(update: int, warmup: int, total: int) -> float:
    """Fraction of the peak learning rate for the 0-based ``update`` of ``total``.

    Rises linearly to 1 at update ``warmup - 1``, falls as a cosine to ``FLOOR`` at update ``total - 1`` and
    stays there.

    Deviations: the published harness uses the value of one update earlier, so its first update has lr 0 and
    does nothing; it also starts a second warm-up after the last update.
    """
    done = update + 1
    if done <= warmup:
        return done / warmup
    progress = min(1.0, (done - warmup) / max(1, total - warmup))
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, *, warmup: int, total: int) -> LambdaLR:
    """The schedule of an optimizer; call ``step()`` once per update.

    It must not go through ``Accelerator.prepare``: the wrapper steps it once a process.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"Invalid warmup_steps: {warmup}, expected 0 … max_steps = {total}")
    return LambdaLR(optimizer, lambda update: factor(update, warmup, total))
