"""Faults that change no result, or none that a machine without a GPU could see, each with its reason."""

from __future__ import annotations

import re

from tests.mutations.sites import Site

# A regular expression for the name of the fault, and why it does not count.
REASONS: tuple[tuple[str, str], ...] = ()


def reason_of(site: Site) -> str | None:
    """Why a fault is left out; None where it counts."""
    return next((reason for pattern, reason in REASONS if re.search(pattern, site.name)), None)
