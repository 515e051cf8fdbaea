"""When a run counts as diverged."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

# Updates in a row that make a divergence.
PATIENCE = 10
# Losses whose median is what a run is used to, and how many it takes to know.
WINDOW, LEAST = 100, 20


@dataclass
class Guard:
    """Counts the updates in a row whose loss or gradient is not finite, or whose loss explodes.

    A loss explodes above ``factor`` times the median of the last ``WINDOW`` losses that did not. After ``PATIENCE``
    such updates in a row the run has diverged.

    Attributes:
        losses: the last ones that were not suspect, oldest first.
        suspect: the number of suspect updates in a row up to now.
    """

    losses: list[float] = field(default_factory=list)
    suspect: int = 0

    def sees(self, loss: float, *, made: bool, factor: float) -> bool:
        """Count one update; whether the run has diverged.

        Args:
            loss: of the update.
            made: False where it was left out, because something was not finite.
            factor: 0 = no loss explodes.
        """
        explodes = bool(factor) and len(self.losses) >= LEAST and loss > factor * median(self.losses)
        if made and not explodes:
            self.losses, self.suspect = [*self.losses[1 - WINDOW :], loss], 0
            return False
        self.suspect += 1
        return self.suspect >= PATIENCE
