#!/usr/bin/env python3
"""Pretrain a LLaMA with a low-rank optimizer; the same as ``lowrank-train``, from a checkout.

    python train_llama.py                                             # minutes on two CPU cores, offline
    accelerate launch train_llama.py --dataset c4 --model llama_60m --dtype bf16

A run folder holds config.yaml, metrics.jsonl, report.html and checkpoint-N folders, each of which transformers loads
and ``--resume`` continues to the last bit.
"""

import sys

from lowrank_optim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
