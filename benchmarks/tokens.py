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

from lowrank_optim.pretrain.readers import Fault, read_documents
from lowrank_optim.pretrain.shards import find_shards
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
    for shard in find_shards(options.data).train:
        texts = (text for _, text in read_documents(shard, "text") if not isinstance(text, Fault))
        while count < options.most and (batch := list(islice(texts, DOCUMENTS))):
            encoded = np.concatenate(encode(tokenizer, batch))
            if encoded.max() >= 2**16:
                raise SystemExit(f"Invalid tokenizer: a token id is {encoded.max()}, expected less than {2**16}")
            rows.append(encoded.astype(np.uint16))
            count += len(encoded)
    tokens = np.concatenate(rows)[: options.most]
    np.save(options.out, tokens)
    print(f"{options.out}: {len(tokens):,} tokens, ids up to {tokens.max()}")


if __name__ == "__main__":
    main()
