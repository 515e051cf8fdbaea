from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_optim.pretrain import corpus, tokenization
from lowrank_optim.pretrain import documents as documents_module
from lowrank_optim.pretrain.batches import (
    Batch,
    Share,
    document_batches,
    ordered_windows,
    permuted,
    shuffled_windows,
)
from lowrank_optim.pretrain.config import Options, Resolved, UserError
from lowrank_optim.pretrain.data import load_data, read_ahead
from lowrank_optim.pretrain.documents import Faults, LocalDocuments
from lowrank_optim.pretrain.readers import read_documents
from lowrank_optim.pretrain.recipes import resolve
from lowrank_optim.pretrain.shards import find_shards
from lowrank_optim.pretrain.sources import Saved, open_source
from lowrank_optim.pretrain.tokenization import (
    check_vocabulary,
    encode,
    encode_starts,
    frame,
    load_tokenizer,
    train_bpe,
)

from .conftest import documents
from .test_readers import table, zst

T5 = Path(__file__).parents[2] / ".." / "shared" / "data" / "tokenizers" / "t5-base"
C4 = T5.parents[1] / "c4_sample" / "en"
needs_t5 = pytest.mark.skipif(not T5.is_dir(), reason="no ../shared/data beside the checkout")


@pytest.fixture
def source(shards: Path, monkeypatch: pytest.MonkeyPatch) -> LocalDocuments:
    monkeypatch.setattr(documents_module, "BLOCK", 8)
    return LocalDocuments(shards, find_shards(str(shards)).train, "text", Faults(0, False), seed=3, loop=True)


@pytest.mark.parametrize("pack", [False, True])
def test_batches_hold_the_documents_and_resume(source: LocalDocuments, pack: bool) -> None:
    tokenizer = train_bpe(documents(50, 0), 320)
    cut = (source, tokenizer, Share(24, 5), 320, pack)
    made = list(islice(document_batches(*cut, None), 30))
    rows = torch.cat([batch.ids for batch, _ in made])
    labels = torch.cat([batch.labels for batch, _ in made])
    texts = [text for _, block in islice(source.blocks(), 40) for text in block]
    encoded = encode(tokenizer, texts)
    if pack:
        joined = torch.tensor(list(chain.from_iterable(encoded)))[: rows.numel()]
        assert torch.equal(rows.flatten(), joined)
        assert torch.equal(labels, rows)
    else:
        for row, label, tokens in zip(rows, labels, encoded):
            kept = min(len(tokens), 24)
            assert row[:kept].tolist() == label[:kept].tolist() == tokens[:kept].tolist()
            assert (label[kept:] == -100).all()
            assert (row[kept:] == tokenizer.pad_token_id).all()
    for start in (0, 7, 20):
        again = list(islice(document_batches(*cut, made[start][1]), 5))
        for (batch, state), (expected, expected_state) in zip(again, made[start + 1 :]):
            assert torch.equal(batch.ids, expected.ids)
            assert torch.equal(batch.labels, expected.labels)
            assert state == expected_state


def together(parts: list[list[tuple[Batch, Any]]]) -> torch.Tensor:
    """The rows of all processes, in the order of the text."""
    return torch.cat([batch.ids for moment in zip(*parts) for batch, _ in moment])


@pytest.mark.parametrize("kind", ["packed", "cut", "tokens"])
def test_any_number_of_processes_reads_the_same(source: LocalDocuments, kind: str) -> None:
    tokenizer = train_bpe(documents(50, 0), 320)
    array = np.arange(1003, dtype=np.uint16)

    def read(world: int, size: int, moments: int, state: Any = None) -> list[list[tuple[Batch, Any]]]:
        def of(rank: int) -> Any:
            if kind == "tokens":
                return shuffled_windows(array, 24, size, rank, world, 0, state)
            return document_batches(source, tokenizer, Share(24, size, rank, world), 320, kind == "packed", state)

        return [list(islice(of(rank), moments)) for rank in range(world)]

    alone = read(1, 12, 12)
    two = read(2, 3, 24)
    assert torch.equal(together(two), together(alone))
    # Two processes stop after five updates of 12 sequences; one, three or four go on from there.
    state = two[0][9][1]
    assert state == two[1][9][1]
    for world, size, accumulate in ((1, 4, 3), (3, 4, 1), (4, 1, 3)):
        rest = read(world, size, 7 * accumulate, state)
        assert torch.equal(together(rest), together(alone)[60:])


def test_the_end_of_a_validation_split_is_padded(source: LocalDocuments) -> None:
    tokenizer = train_bpe(documents(50, 0), 320)
    once = replace(source, loop=False)
    tokens = list(chain.from_iterable(encode(tokenizer, [text for _, block in once.blocks() for text in block])))
    for world in (1, 2):
        parts = [
            document_batches(once, tokenizer, Share(24, 5, r, world), 320, True, None, partial=True)
            for r in range(world)
        ]
        batches = [batch for part in parts for batch, _ in part]
        assert sum(int((batch.labels != -100).sum()) for batch in batches) == len(tokens)
        assert Counter(chain.from_iterable(b.labels[b.labels != -100].tolist() for b in batches)) == Counter(tokens)


def test_windows_cover_an_epoch_and_resume() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    made = [list(islice(shuffled_windows(tokens, 5, 3, rank, 2, 0, None), 10)) for rank in (0, 1)]
    starts = [start for moment in zip(*made) for batch, _ in moment for start in batch.ids[:, 0].tolist()]
    for epoch in (starts[:20], starts[20:40], starts[40:60]):
        assert sorted(epoch) == list(range(0, 100, 5))
    assert starts[:20] != starts[20:40]
    assert [state["epoch"] for _, state in made[0]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    for i, (_, state) in enumerate(made[1][:-1]):
        following, after = next(shuffled_windows(tokens, 5, 3, 1, 2, 0, state))
        assert torch.equal(following.ids, made[1][i + 1][0].ids)
        assert after == made[1][i + 1][1]
    ordered = [b.labels for rank in (0, 1) for b in ordered_windows(tokens, 5, 3, rank, 2)]
    assert sorted(chain.from_iterable(part[part != -100].tolist() for part in ordered)) == list(range(103))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 1000, 4097])
def test_a_permutation_is_one(count: int) -> None:
    one, other = (permuted(np.arange(count), count, key) for key in ("0 0", "0 1"))
    assert sorted(one.tolist()) == sorted(other.tolist()) == list(range(count))
    if count > 10:
        assert (one != other).any()
        # Neighbours do not stay neighbours.
        assert (np.abs(np.diff(one)) == 1).mean() < 0.3
    # One number is sent where it is sent among others.
    assert permuted(np.arange(count)[-1:], count, "0 0") == one[-1]


@needs_t5
def test_published_recipe_on_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK", 8)
    options = Options(dataset=str(C4), tokenizer=str(T5), model="llama_9m", batch_size=4, pack=False)
    data = load_data(resolve(options, hidden_size=128, processes=1), vocab_size=32000)
    batch, _ = next(data.train(None))
    assert batch.ids.shape == (4, 256)
    _, text = next(read_documents(find_shards(str(C4)).validation[0], "text"))
    first = next(data.validation())
    expected = data.tokenizer(text, truncation=True, max_length=256)["input_ids"]
    assert first.ids[0, : len(expected)].tolist() == expected
    assert expected[-1] == data.tokenizer.eos_token_id == 1
    assert "2,999 documents of about" in data.description
    assert "each document is cut or padded to 256 tokens, which keeps" in data.description


@needs_t5
def test_sentinels_do_not_count() -> None:
    tokenizer = load_tokenizer(str(T5))
    assert len(tokenizer) == 32100
    check_vocabulary(tokenizer, 32000, "llama_60m")
    with pytest.raises(UserError, match="token ids reach 31999, but small has a vocabulary of 31999"):
        check_vocabulary(tokenizer, 31999, "small")


@needs_t5
def test_pieces_of_a_long_document_are_encoded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for tokenizer in (load_tokenizer(str(T5)), train_bpe(documents(50, 0), 320)):
        text = " ".join(documents(200, 1))
        (whole,) = encode(tokenizer, [text])
        with monkeypatch.context() as patch:
            patch.setattr(tokenization, "PIECE", 1000)
            short, pieces, _ = encode(tokenizer, ["a dog", text, "x" * 5000])
        assert pieces.tolist() == whole.tolist()
        assert whole[-1] == short[-1] == tokenizer.eos_token_id
        assert (whole[:-1] != tokenizer.eos_token_id).all()


def test_what_a_tokenizer_puts_around_a_text() -> None:
    from tokenizers import processors

    tokenizer = train_bpe(documents(50, 0), 320)
    assert frame(tokenizer) == ([], [])
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    pieces = [("<pad>", pad), ("</s>", end)]
    template = processors.TemplateProcessing(single="<pad> $A </s> </s>", special_tokens=pieces)
    tokenizer.backend_tokenizer.post_processor = template
    assert frame(tokenizer) == ([pad], [end, end])
    (row,) = encode(tokenizer, ["the dog"])
    assert row.tolist() == tokenizer("the dog")["input_ids"]


def test_token_beyond_the_vocabulary(source: LocalDocuments) -> None:
    with pytest.raises(UserError, match=r"Invalid token id: .* expected less than the model's 30"):
        next(document_batches(source, train_bpe(documents(9, 0), 320), Share(24, 5), 30, False, None))


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot load tokenizer"):
        load_tokenizer(str(tmp_path))


def test_stdlib_corpus_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "lib"
    for i in range(60):
        (root / f"p{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"p{i % 3}" / f"m{i}.py").write_text(f"def f{i}():\n    return '{documents(1, i)[0]}'\n")
    (root / "test").mkdir()
    (root / "test" / "left_out.py").write_text("zzz")
    first = corpus.load_stdlib(None, 300, show=False, root=root)
    decoded = first.tokenizer.decode(first.train.tolist())
    assert "def f" in decoded
    assert "zzz" not in decoded
    assert first.train.dtype == np.uint16
    assert 0 < len(first.validation) < len(first.train)
    monkeypatch.setattr(corpus, "train_bpe", lambda *_: pytest.fail("the cache was not used"))
    second = corpus.load_stdlib(None, 300, show=False, root=root)
    assert np.array_equal(first.train, second.train)
    assert first.fingerprint == second.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (root / "p0" / "m0.py").write_text("changed = 1\n")
    assert corpus.load_stdlib(None, 300, show=False, root=root).fingerprint != first.fingerprint


def test_stdlib_without_a_writable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    assert len(corpus.load_stdlib(None, 300, show=False, root=tmp_path).train)
    assert "cannot cache" in capsys.readouterr().err


def test_read_ahead_passes_items_and_errors_on() -> None:
    def items() -> object:
        yield from range(3)
        raise UserError("broken")

    ahead = read_ahead(items(), depth=2)  # type: ignore[arg-type]
    assert list(islice(ahead, 3)) == [0, 1, 2]
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    assert list(read_ahead(iter(range(5)), depth=1)) == list(range(5))


def options(dataset: Path, **more: Any) -> Resolved:
    values = {"seq_len": 16, "batch_size": 2, "accumulate": 1, "max_steps": 10, **more}
    return resolve(Options(dataset=str(dataset), model="llama_tiny", **values), hidden_size=16, processes=1)


DOCUMENTS = documents(400, 7)
TEXT = "\n\n".join(DOCUMENTS)


def book(root: Path) -> list[str]:
    (root / "book.txt").write_text(TEXT)
    return [TEXT]


def book_without_blank_lines(root: Path) -> list[str]:
    text = TEXT.replace("\n\n", "\n")
    (root / "book.txt").write_text(text)
    return [text]


def one_line(root: Path) -> list[str]:
    text = TEXT.replace("\n\n", " ")
    (root / "book.txt").write_text(text)
    return [text]


def twenty_files(root: Path) -> list[str]:
    texts = ["\n\n".join(DOCUMENTS[start : start + 20]) for start in range(0, 400, 20)]
    for number, text in enumerate(texts):
        (root / f"{number}.txt").write_text(text)
    return texts


def markdown(root: Path) -> list[str]:
    (root / "README.md").write_text("about this folder")
    (root / "notes").mkdir()
    (root / "notes" / "a.md").write_text(TEXT)
    return [TEXT]


def with_bom(root: Path) -> list[str]:
    (root / "book.txt").write_text(TEXT, encoding="utf-8-sig")
    return [TEXT]


def compressed(root: Path) -> list[str]:
    texts = ["\n\n".join(DOCUMENTS[:200]), "\n\n".join(DOCUMENTS[200:])]
    (root / "a.txt.gz").write_bytes(gzip.compress(texts[0].encode()))
    (root / "b.txt.zst").write_bytes(zst(texts[1].encode()))
    return texts


def json_lines(root: Path) -> list[str]:
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return DOCUMENTS


def content_field(root: Path) -> list[str]:
    (root / "a.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in DOCUMENTS))
    return DOCUMENTS


def json_array(root: Path) -> list[str]:
    (root / "a.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
    return DOCUMENTS


def parquet(root: Path) -> list[str]:
    table(root / "a.parquet", DOCUMENTS, "parquet")
    return DOCUMENTS


def datasets_folder(root: Path) -> list[str]:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(root / "train"), num_shards=2)
    return DOCUMENTS


def split_folders(root: Path) -> list[str]:
    for name, texts in (("train", DOCUMENTS[:380]), ("val", DOCUMENTS[380:]), ("test", documents(9, 9))):
        (root / name).mkdir()
        (root / name / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DOCUMENTS


CASES: list[Callable[[Path], list[str]]] = [
    book, book_without_blank_lines, one_line, twenty_files, markdown, with_bom, compressed, json_lines, content_field,
    json_array, parquet, datasets_folder, split_folders,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_own_text(case: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """Every word of every kind of own text is trained on or held out, once; with ``-s`` a table of the tokens."""
    texts = case(tmp_path)
    field = "content" if case is content_field else "text"
    source = open_source(options(tmp_path, text_field=field), vocab_size=320, show=True)

    def read(documents: Any) -> tuple[Counter[str], int]:
        found = [text for _, block in replace(documents, loop=False).blocks() for text in block]
        return Counter(" ".join(found).split()), sum(map(len, encode(source.tokenizer, found)))

    (trained, tokens), (held, tokens_held) = read(source.training), read(source.held_out)
    found = sum(map(len, encode(source.tokenizer, texts)))
    print(f"\n{case.__name__:25}{found:8,} found{tokens:8,} trained{tokens_held:8,} held out", end="")
    assert trained + held == Counter(" ".join(texts).split())
    assert 0.01 < tokens_held / (tokens + tokens_held) < 0.2
    # A section ends with the end-of-text token instead of its line breaks; a word may be cut into other pieces there.
    assert abs(tokens + tokens_held - found) < 20
    if case is split_folders:
        assert held == Counter(" ".join(DOCUMENTS[380:]).split())


@needs_t5
def test_the_start_of_a_document_is_encoded_as_in_the_whole() -> None:
    texts = [text for _, text in islice(read_documents(find_shards(str(C4)).train[0], "text"), 60)]
    # Few tokens from many characters: its start is too short.
    texts.append("x" + " " * 3000 + "the dog runs " * 50)
    for tokenizer in (load_tokenizer(str(T5)), train_bpe(documents(50, 0), 320)):
        whole = encode(tokenizer, texts)
        starts = encode_starts(tokenizer, texts, 64)
        assert [row[:64].tolist() for row in starts] == [row[:64].tolist() for row in whole]
        # Which documents are cut is known.
        assert [len(row) > 64 for row in starts] == [len(row) > 64 for row in whole]
        assert sum(map(len, starts)) < 0.6 * sum(map(len, whole))


def test_a_checkpoint_of_version_0_1_begins_the_text_anew(tmp_path: Path) -> None:
    text, saved = tmp_path / "text", Saved("0123456789abcdef-0123456789abcdef", tmp_path / "checkpoint-3")
    text.mkdir()
    json_lines(text)
    train_bpe(documents(50, 0), 320).save_pretrained(saved.folder)
    with pytest.raises(UserError, match=r"Cannot resume .*version 0\.1 .*; --allow-changed-data continues"):
        load_data(options(text), vocab_size=320, saved=saved)
    data = load_data(options(text, allow_changed_data=True), vocab_size=320, saved=saved)
    assert "since the checkpoint: version 0.1 read text in another order" in data.description
    old = {"position": {"epoch": 0, "shard": 3, "document": 9}, "used": 1, "rest": [5]}
    (first, _), (other, _) = next(data.train(old)), next(data.train(None))
    assert torch.equal(first.ids, other.ids)
    assert load_data(options(text), vocab_size=320, saved=Saved(data.fingerprint, saved.folder)).tokenizer


def test_another_tokenizer_is_never_continued_with(tmp_path: Path) -> None:
    text, saved = tmp_path / "text", tmp_path / "checkpoint-3"
    text.mkdir()
    json_lines(text)
    for folder, seed in ((saved, 0), (tmp_path / "other", 1)):
        train_bpe(documents(50, seed), 320).save_pretrained(folder)
    before = load_data(options(text, tokenizer=str(saved)), vocab_size=320).fingerprint
    changed = options(text, tokenizer=str(tmp_path / "other"), allow_changed_data=True)
    with pytest.raises(UserError, match="the tokenizer is not the one that it was saved with"):
        load_data(changed, vocab_size=320, saved=Saved(before, saved))
