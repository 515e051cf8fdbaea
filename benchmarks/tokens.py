"""Token ids of text as one array: ``python -m benchmarks.tokens --data FOLDER --tokenizer FOLDER --out tokens.npy``.

Documents one after the other, each with its end-of-text token, in uint16: what ``benchmarks.gpu --tokens`` trains on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowrank_optim.pretrain.shards import find_shards, read_shard
from lowrank_optim.pretrain.tokenization import encode, load_tokenizer

DOCUMENTS = 500


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="a folder or file of .json.gz, .jsonl or .txt shards")
    parser.add_argument("--tokenizer", required=True, help="a folder of a tokenizer, or its name on the hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=14_000_000, help="tokens at most")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(options.tokenizer)
    rows: list[NDArray[np.uint16]] = []
    count = 0
    for shard in find_shards(options.data)[0]:
        texts = (text for _, text in read_shard(shard))
        while count < options.most and (batch := list(islice(texts, DOCUMENTS))):
            for row in encode(tokenizer, batch, None):
                # Refuses an id of 2^16 or more.
                rows.append(np.array(row, dtype=np.uint16))
                count += len(row)
    tokens = np.concatenate(rows)[: options.most]
    np.save(options.out, tokens)
    print(f"{options.out}: {len(tokens):,} tokens, ids up to {tokens.max()}")


if __name__ == "__main__":
    main()
