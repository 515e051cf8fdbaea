from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_optim.pretrain import corpus
from lowrank_optim.pretrain import shards as shards_module
from lowrank_optim.pretrain.config import Options, UserError
from lowrank_optim.pretrain.data import (
    document_batches,
    load_data,
    looks_local,
    ordered_windows,
    read_ahead,
    shuffled_windows,
)
from lowrank_optim.pretrain.recipes import resolve
from lowrank_optim.pretrain.shards import LocalDocuments, Slice, find_shards, read_shard
from lowrank_optim.pretrain.tokenization import check_vocabulary, encode, load_tokenizer, train_bpe

from .conftest import documents

T5 = Path(__file__).parents[2] / ".." / "shared" / "data" / "tokenizers" / "t5-base"
C4 = T5.parents[1] / "c4_sample" / "en"
needs_t5 = pytest.mark.skipif(not T5.is_dir(), reason="no ../shared/data beside the checkout")


@pytest.mark.parametrize("pack", [False, True])
def test_batches_hold_the_documents_and_resume(shards: Path, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "BLOCK", 8)
    tokenizer = train_bpe(documents(50, 0), 320)
    source = LocalDocuments(find_shards(str(shards))[0], Slice(0, 1, None), seed=3, loop=True)
    cut = (source, tokenizer, 24, 5, 320, pack)
    made = list(islice(document_batches(*cut, None), 30))
    rows = torch.cat([batch.ids for batch, _ in made])
    labels = torch.cat([batch.labels for batch, _ in made])
    texts = [text for _, block in islice(source.blocks(), 40) for text in block]
    encoded = encode(tokenizer, texts, None)
    if pack:
        joined = torch.tensor(list(chain.from_iterable(encoded)))[: rows.numel()]
        assert torch.equal(rows.flatten(), joined)
        assert torch.equal(labels, rows)
    else:
        for row, label, tokens in zip(rows, labels, encoded):
            kept = min(len(tokens), 24)
            assert row[:kept].tolist() == label[:kept].tolist() == tokens[:kept]
            assert (label[kept:] == -100).all()
            assert (row[kept:] == tokenizer.pad_token_id).all()
    for start in (0, 7, 20):
        again = list(islice(document_batches(*cut, made[start][1]), 5))
        for (batch, state), (expected, expected_state) in zip(again, made[start + 1 :]):
            assert torch.equal(batch.ids, expected.ids)
            assert torch.equal(batch.labels, expected.labels)
            assert state == expected_state


def test_windows_cover_an_epoch_and_resume() -> None:
    tokens = np.arange(103, dtype=np.uint16)
    made = [list(islice(shuffled_windows(tokens, 5, 3, rank, 2, 0, None), 8)) for rank in (0, 1)]
    starts = [[batch.ids[:, 0].tolist() for batch, _ in part] for part in made]
    epochs = [[*starts[0][i : i + 3], *starts[1][i : i + 3]] for i in (0, 3)]
    for epoch in epochs:
        seen = list(chain.from_iterable(epoch))
        assert len(seen) == len(set(seen)) == 18
        assert all(start % 5 == 0 for start in seen)
    assert epochs[0] != epochs[1]
    for i, (_, state) in enumerate(made[1][:-1]):
        following, after = next(shuffled_windows(tokens, 5, 3, 1, 2, 0, state))
        assert torch.equal(following.ids, made[1][i + 1][0].ids)
        assert after == made[1][i + 1][1]
    ordered = [b.ids[:, 0].tolist() for rank in (0, 1) for b in ordered_windows(tokens, 5, 3, rank, 2)]
    assert sorted(chain.from_iterable(ordered)) == list(range(0, 100, 5))


@needs_t5
def test_published_recipe_on_c4() -> None:
    options = Options(dataset=str(C4), tokenizer=str(T5), model="llama_9m", batch_size=4)
    data = load_data(resolve(options, hidden_size=128, processes=1), vocab_size=32000)
    batch, _ = next(data.train(None))
    assert batch.ids.shape == (4, 256)
    _, text = next(read_shard(find_shards(str(C4))[1][0]))
    first = next(data.validation())
    expected = data.tokenizer(text, truncation=True, max_length=256)["input_ids"]
    assert first.ids[0, : len(expected)].tolist() == expected
    assert expected[-1] == data.tokenizer.eos_token_id == 1


@needs_t5
def test_sentinels_do_not_count() -> None:
    tokenizer = load_tokenizer(str(T5))
    assert len(tokenizer) == 32100
    check_vocabulary(tokenizer, 32000, "llama_60m")
    with pytest.raises(UserError, match="token ids reach 31999, but small has a vocabulary of 31999"):
        check_vocabulary(tokenizer, 31999, "small")


def test_token_beyond_the_vocabulary(shards: Path) -> None:
    source = LocalDocuments(find_shards(str(shards))[0], Slice(0, 1, None), seed=0, loop=True)
    with pytest.raises(UserError, match=r"Invalid token id: .* expected less than the model's 30"):
        next(document_batches(source, train_bpe(documents(9, 0), 320), 24, 5, 30, False, None))


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


def test_names_meant_as_paths() -> None:
    assert all(map(looks_local, ["./x", "/x", "../x", "~/x", "a/b/c", "x.jsonl"]))
    assert not any(map(looks_local, ["c4", "allenai/c4", "allenai/c4:en"]))


def test_read_ahead_passes_items_and_errors_on() -> None:
    def items() -> object:
        yield from range(3)
        raise UserError("broken")

    ahead = read_ahead(items(), depth=2)  # type: ignore[arg-type]
    assert list(islice(ahead, 3)) == [0, 1, 2]
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    assert list(read_ahead(iter(range(5)), depth=1)) == list(range(5))
