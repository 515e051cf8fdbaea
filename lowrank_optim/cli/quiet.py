"""What command lines ask of other libraries before they are imported: no hints to programmers on a user's terminal."""

from __future__ import annotations

import logging
import os

# Before torch starts its threads: where other programs want the cores too, threads that wait by spinning make an
# update 3 times slower (measured on 2 cores); alone it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
# What it logs as an error it raises as well.
os.environ.setdefault("DATASETS_VERBOSITY", "critical")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
