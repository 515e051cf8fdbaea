from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest

from lowrank_optim.pretrain import documents as module
from lowrank_optim.pretrain import hub
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.documents import Faults, HoldOut, LocalDocuments, hold_out_of, look, place
from lowrank_optim.pretrain.hub import HubDocuments

from .conftest import documents, write_shard


def faults(limit: int = 0) -> Faults:
    return Faults(limit, show=False)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalDocuments:
    """Three shards of ten documents, in blocks of four."""
    monkeypatch.setattr(module, "BLOCK", 4)
    for seed, name in enumerate("abc"):
        write_shard(tmp_path / f"{name}.json.gz", documents(10, seed))
    return LocalDocuments(tmp_path, sorted(tmp_path.iterdir()), "text", faults(), seed=1, loop=True)


def texts_of(blocks: Any) -> list[str]:
    return [text for _, block in blocks for text in block]


def test_reading_on_from_any_position(source: LocalDocuments) -> None:
    blocks = list(islice(source.blocks(), 25))
    assert {position["epoch"] for position, _ in blocks} == {0, 1, 2, 3}
    for i, (position, _) in enumerate(blocks):
        json.dumps(position)
        assert list(islice(source.blocks(position), 25 - i)) == blocks[i:]
    first, second = (texts_of(blocks[start : start + 8]) for start in (0, 8))
    everything = [text for seed in range(3) for text in documents(10, seed)]
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != second
    assert list(islice(replace(source, seed=2).blocks(), 8)) != blocks[:8]
    # Without an end, the order is that of the files.
    assert texts_of(replace(source, loop=False).blocks()) == everything


def test_a_block_ends_at_many_characters(source: LocalDocuments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 1)
    assert all(len(block) == 1 for _, block in islice(source.blocks(), 40))


def epoch_from(source: LocalDocuments, position: Any) -> list[str]:
    """The documents from a position to the end of its epoch."""
    return texts_of(takewhile(lambda block: block[0]["epoch"] == position["epoch"], source.blocks(position)))


def test_shards_may_come_and_go(source: LocalDocuments) -> None:
    position, _ = list(islice(source.blocks(), 5))[-1]
    before = epoch_from(source, position)
    assert 4 < len(before) < 20
    new, shard = documents(10, 3), [path for path in source.shards if path.name == position["shard"]]
    write_shard(source.root / "d.json.gz", new)
    grown = epoch_from(replace(source, shards=sorted(source.root.iterdir())), position)
    assert Counter(grown) - Counter(new) == Counter(before)
    # The shard in which the position lies is gone: the next one in the order follows.
    gone = texts_of(replace(source, loop=False, shards=shard).blocks())
    rest = epoch_from(replace(source, shards=[path for path in source.shards if path not in shard]), position)
    assert Counter(rest) == Counter(before) - Counter(gone)
    assert rest


def test_a_repaired_line_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    lines = [json.dumps({"text": text}) for text in documents(40, 0)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines[:7], "{", *lines[8:]]))
    source = LocalDocuments(tmp_path, [path], "text", faults(1), seed=0, loop=True)
    broken = list(islice(source.blocks(), 9))
    assert [position["bad"] for position, _ in broken] == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    path.write_text("\n".join(lines))
    position = broken[3][0]
    assert texts_of(islice(source.blocks(position), 6)) == texts_of(broken[3:])


def test_faults_are_said_once_and_counted_in_every_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{\n{"text": ""}\n')
    source = LocalDocuments(tmp_path, [path], "text", Faults(2, show=True), seed=0, loop=True)
    assert [position["epoch"] for position, _ in islice(source.blocks(), 3)] == [0, 1, 2]
    warned = capsys.readouterr().err.splitlines()
    assert [line.partition(" is ")[0] for line in warned] == [f"warning: left out: {path} line {n}" for n in (2, 3)]
    with pytest.raises(UserError, match=r"a\.jsonl line 3 is empty; --max-bad-documents allows 1"):
        list(islice(replace(source, faults=faults(1)).blocks(), 3))
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is no JSON .*; --max-bad-documents allows 0"):
        look([path], tmp_path, "text", faults())


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1000], [1000, 1], [45, 45, 10], [5] * 20, [300] * 73, [1] * 4000])
def test_a_share_of_the_text_is_held_out(sizes: list[int]) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        known = [(rng.random(), size) for size in sizes]
        hold_out = hold_out_of(known)
        held = [size for at, size in known if hold_out.takes(at, size)]
        assert held
        assert len(held) < len(sizes)
        assert sum(held) / sum(sizes) <= max(0.02 + max(held) / sum(sizes), min(sizes) / sum(sizes))
        assert sum(held) / sum(sizes) >= 0.02 or max(sizes) > 0.5 * sum(sizes)
        assert max(held) <= max(0.1 * sum(sizes), min(sizes))


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(UserError, match="a single document, of which none can be held out"):
        hold_out_of([(0.5, 100)])


def test_what_is_held_out_is_the_rest(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(700)]
    write_shard(tmp_path / "a.json.gz", texts)
    both = LocalDocuments(tmp_path, [tmp_path / "a.json.gz"], "text", faults(), 0, False, HoldOut())
    kept, held = texts_of(both.blocks()), texts_of(replace(both, held=True).blocks())
    assert sorted(kept + held) == sorted(texts)
    assert 0 < len(held) < 40
    assert all(place("a.json.gz", texts.index(text) + 1) < 0.02 for text in held)
    longer = replace(both, hold_out=HoldOut(longest=11), held=True)
    assert all(len(text) <= 11 for text in texts_of(longer.blocks()))


def test_a_look_stops_and_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        write_shard(tmp_path / f"{seed}.json.gz", documents(300, seed))
    files = sorted(tmp_path.iterdir())
    everything = look(files, tmp_path, "text", faults())
    assert everything.share == 1
    assert len(everything.sizes) == 1200
    monkeypatch.setattr(module, "LOOK", sum(size for _, size in everything.sizes) // 2)
    part = look(files, tmp_path, "text", faults())
    assert part.sizes == everything.sizes[: len(part.sizes)]
    assert len(part.sizes) / part.share == pytest.approx(1200, rel=0.3)
    # The start of the others is read nevertheless.
    (tmp_path / "3.json.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3\.json\.gz breaks off"):
        look(files, tmp_path, "text", faults())


def test_empty_shards(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    write_shard(tmp_path / "b.json.gz", ["x"])
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"a\.jsonl holds no document; --max-bad-documents allows 0"):
        look(files, tmp_path, "text", faults())
    assert len(look(files, tmp_path, "text", faults(1)).sizes) == 1
    with pytest.raises(UserError, match=r"holds no document$"):
        look(files[:1], tmp_path, "text", faults(1))
    with pytest.raises(UserError, match="holds no document to train on"):
        next(LocalDocuments(tmp_path, files[:1], "text", faults(), 0, True).blocks())


@pytest.mark.parametrize("state", ["kept", "frozen"])
def test_hub_stream_resumes_twice(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(module, "BLOCK", 4)
    files = sorted(str(p) for p in shards.glob("*train*"))[:2]

    def stream(name: str, split: str) -> Any:
        opened = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
        if state == "frozen":
            # What some releases did after a resume: datasets#8308.
            frozen = opened.state_dict()
            monkeypatch.setattr(type(opened), "state_dict", lambda self: frozen)
        return opened

    monkeypatch.setattr(hub, "open_stream", stream)
    source = HubDocuments("name", "train", "text", faults(), seed=0, loop=True, hold_out=HoldOut(0.3))
    blocks = [(position, list(block)) for position, block in islice(source.blocks(), 20)]
    assert {position["epoch"] for position, _ in blocks} == {0, 1, 2}
    resumed, position = [], None
    for length in (2, 3, 1, 14):
        # The position of the block to come is the state that a checkpoint between two blocks holds.
        part = list(islice(source.blocks(position), length + 1))
        resumed += [block for _, block in part[:length]]
        position = part[length][0]
    assert resumed == [block for _, block in blocks]
    one = Counter(texts_of(replace(source, loop=False).blocks()))
    one += Counter(texts_of(replace(source, loop=False, held=True).blocks()))
    assert one == Counter(text for seed in (0, 1) for text in documents(20, seed))


def test_broken_records_of_the_hub_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(list[Any]):
        def state_dict(self) -> None:
            return None

    monkeypatch.setattr(hub, "open_stream", lambda *_: Stream([{"text": "x"}, {"text": None}, {"url": "y"}]))
    source = HubDocuments("a/b", "train", "text", faults(2), seed=0, loop=False)
    assert texts_of(source.blocks()) == ["x"]
    with pytest.raises(UserError, match=r"a/b train record 3 has no 'text' string .*allows 1"):
        list(replace(source, faults=faults(1)).blocks())
