from __future__ import annotations

import gzip
import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from lowrank_optim.pretrain import shards as module
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.shards import HubDocuments, LocalDocuments, Slice, find_shards, read_shard

from .conftest import documents, write_shard

ALL = Slice(0, 1, None)


def test_names_split_the_shards(shards: Path) -> None:
    train, validation = find_shards(str(shards))
    assert [p.name[:8] for p in train] == ["c4-train"] * 3
    assert [p.name[:13] for p in validation] == ["c4-validation"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    texts = documents(5, 0)
    lines = "\n\n\n".join(texts) if ".txt" in name else "\n".join(json.dumps({"text": t}) for t in texts)
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    assert list(read_shard(path)) == list(enumerate(texts))
    assert list(read_shard(path, 3)) == list(enumerate(texts))[3:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "Empty shard: .*a.jsonl"),
        ("a.json.gz", b"", "Empty shard: .*a.json.gz"),
        # Without the time, which would give the test another name in each of pytest's processes.
        ("a.json.gz", gzip.compress(b"\n\n", mtime=0), "Empty shard"),
        ("a.json.gz", b"plain text", "Broken shard: .*a.json.gz"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 9999, mtime=0)[:-20], "Broken shard: .*a.json.gz after line"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "Broken shard: .*a.jsonl line 2 is no JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "line 2 is no JSON object with a 'text'"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', "line 2 is no JSON object"),
        ("a.txt", b"caf\xe9", "no UTF-8"),
        ("a.csv", b"x", r"holds no \*.json.gz"),
        ("a-validation.jsonl", b'{"text": "x"}\n', "validation shards only"),
    ],
)
def test_bad_shards(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        for shard in find_shards(str(tmp_path))[0]:
            list(read_shard(shard))


def test_processes_and_held_out_documents_partition_a_shard(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(130)]
    write_shard(tmp_path / "a.json.gz", texts)
    parts = [
        [text for _, block in LocalDocuments([tmp_path / "a.json.gz"], part, 0, loop=False).blocks() for text in block]
        for part in (Slice(0, 2, False), Slice(1, 2, False), Slice(0, 2, True), Slice(1, 2, True))
    ]
    assert sorted(chain.from_iterable(parts)) == sorted(texts)
    assert parts[2] == ["document 0", "document 50", "document 100"]


def test_reading_on_from_any_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    paths = [tmp_path / f"{name}.json.gz" for name in "abc"]
    for seed, path in enumerate(paths):
        write_shard(path, documents(10, seed))
    source = LocalDocuments(paths, ALL, seed=1, loop=True)
    blocks = list(islice(source.blocks(), 25))
    assert {position["epoch"] for position, _ in blocks} == {0, 1, 2}
    for i, (position, _) in enumerate(blocks):
        assert list(islice(source.blocks(position), 25 - i)) == blocks[i:]
    first = [text for _, block in blocks[:9] for text in block]
    second = [text for _, block in blocks[9:18] for text in block]
    assert sorted(first) == sorted(second)
    assert first != second
    assert list(islice(LocalDocuments(paths, ALL, seed=2, loop=True).blocks(), 9)) != blocks[:9]


def test_a_process_without_documents(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.json.gz", ["only one"])
    with pytest.raises(UserError, match="No training document for process 1"):
        next(LocalDocuments([tmp_path / "a.json.gz"], Slice(1, 2, None), 0, loop=True).blocks())


@pytest.mark.parametrize("state", ["kept", "absent", "frozen"])
@pytest.mark.parametrize("rank", [0, 1])
def test_hub_stream_resumes_twice(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, rank: int
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(module, "BLOCK", 4)
    files = sorted(str(p) for p in shards.glob("*train*"))[:2]

    def stream(name: str, split: str) -> Any:
        opened = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
        if state == "frozen":
            # What some releases did after a resume: datasets#8308.
            frozen = opened.state_dict()
            monkeypatch.setattr(type(opened), "state_dict", lambda self: frozen)
        if state == "absent":
            monkeypatch.delattr(type(opened), "state_dict", raising=False)
        return opened

    monkeypatch.setattr(module, "open_stream", stream)
    source = HubDocuments("name", "train", Slice(rank, 2, None), seed=0, loop=True)
    blocks = [(position, list(block)) for position, block in islice(source.blocks(), 13)]
    assert {position["epoch"] for position, _ in blocks} == {0, 1, 2}
    resumed, position = [], None
    for length in (2, 3, 1, 7):
        # The position of the block to come is the state that a checkpoint between two blocks holds.
        part = list(islice(source.blocks(position), length + 1))
        resumed += [block for _, block in part[:length]]
        position = part[length][0]
    assert resumed == [block for _, block in blocks]
