from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_optim.cli.main import main
from lowrank_optim.pretrain import documents as documents_module
from lowrank_optim.pretrain import tokens as module
from lowrank_optim.pretrain.config import Options, Resolved, UserError
from lowrank_optim.pretrain.data import load_data
from lowrank_optim.pretrain.recipes import resolve
from lowrank_optim.pretrain.sources import open_source
from lowrank_optim.pretrain.tokenization import encode, train_bpe

from .conftest import documents


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 documents without a mark, in blocks of 16."""
    monkeypatch.setattr(documents_module, "BLOCK", 16)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(2):
        lines = [json.dumps({"content": text}) + "\n" for text in documents(100, number)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def line(text: Path, out: Path, *more: str) -> list[str]:
    return ["tokenize", "--dataset", str(text), "--text-field", "content", "--output-dir", str(out), *more]


def options(dataset: Path, **more: Any) -> Resolved:
    values = {"seq_len": 16, "batch_size": 4, "accumulate": 1, "max_steps": 10, "text_field": "content", **more}
    return resolve(Options(dataset=str(dataset), model="llama_tiny", **values), hidden_size=16, processes=1)


def tokens_of(batches: Any) -> list[int]:
    return list(chain.from_iterable(batch.labels[batch.labels != -100].tolist() for batch in batches))


@pytest.mark.parametrize("pack", [True, False])
def test_tokens_are_taken_like_text(text: Path, tmp_path: Path, capsys: Any, pack: bool) -> None:
    assert main(line(text, tmp_path / "tokens")) == 0
    out = capsys.readouterr().out
    both = plain, tokens = [
        load_data(options(path, pack=pack), vocab_size=8192) for path in (text, tmp_path / "tokens")
    ]
    source = open_source(options(text), vocab_size=8192, show=False)
    blocks = replace(source.training, loop=False).blocks()
    trained = list(chain.from_iterable(encode(source.tokenizer, [text for _, block in blocks for text in block])))
    manifest = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    assert manifest["train"]["tokens"] == len(trained)
    assert f"{len(trained):,} tokens" in out
    assert manifest["dtype"] == "<u2"
    ids = np.fromfile(tmp_path / "tokens" / "train.bin", dtype="<u2")
    assert ids.tolist() == trained
    # The same documents are held out, and cut in the same way.
    held = [sorted(map(tuple, torch.cat([b.ids for b in data.validation()]).tolist())) for data in both]
    assert Counter(tokens_of(plain.validation())) == Counter(tokens_of(tokens.validation()))
    assert pack or held[0] == held[1]
    one_pass = len(ids) // 16 // 4 if pack else manifest["train"]["documents"] // 4
    batches = [batch for batch, _ in islice(tokens.train(None), one_pass)]
    if pack:
        assert not Counter(tokens_of(batches)) - Counter(trained)
    else:
        rows = [{tuple(row) for b, _ in islice(data.train(None), one_pass) for row in b.ids.tolist()} for data in both]
        # The last documents do not fill a batch.
        assert len(rows[0] - rows[1]) <= 3
    made = list(islice(tokens.train(None), 80))
    assert made[-1][1]["epoch"] >= 1
    for start in (0, 33, 60):
        (batch, state), *_ = islice(tokens.train(made[start][1]), 1)
        assert torch.equal(batch.ids, made[start + 1][0].ids)
        assert state == made[start + 1][1]
    assert "documents of" in tokens.description


def test_a_call_that_breaks_off_continues(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main(line(text, tmp_path / "whole")) == 0
    calls: list[int] = []

    def stop(tokenizer: Any, texts: list[str]) -> Any:
        calls.append(len(texts))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(tokenizer, texts)

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode", stop)
        assert main(line(text, tmp_path / "parts")) == 130
        assert "stopped; the same call continues" in capsys.readouterr().err
        assert not (tmp_path / "parts").exists()
        done = sum(calls[:7])
        calls[:] = [0] * 9
        assert main(line(text, tmp_path / "parts")) == 0
    assert sum(calls[9:]) == 200 - done
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokens.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts.partial").exists()


def test_a_changed_text_continues_if_it_may(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(documents_module, "LOOK", 1)
    train_bpe(documents(50, 0), 320).save_pretrained(tmp_path / "tokenizer")
    more = line(text, tmp_path / "out", "--tokenizer", str(tmp_path / "tokenizer"))
    lines = (text / "1.jsonl").read_text().splitlines()
    (text / "1.jsonl").write_text("\n".join([*lines[:50], "{", *lines[51:]]) + "\n")
    assert main([*more, "--max-bad-documents", "0"]) == 2
    assert "1.jsonl line 51 is no JSON" in capsys.readouterr().err
    begun = module.read_progress(tmp_path / "out.partial")
    assert begun and begun["train"]["documents"] > 100
    (text / "1.jsonl").write_text("\n".join(lines) + "\n")
    assert main(more) == 2
    assert "it was begun with another text or tokenizer" in capsys.readouterr().err
    encoded: list[str] = []

    def count(tokenizer: Any, texts: list[str]) -> Any:
        encoded.extend(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(module, "encode", count)
    assert main([*more, "--allow-changed-data"]) == 0
    assert len(encoded) == 200 - begun["train"]["documents"]
    made = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert made["train"]["documents"] + made["validation"]["documents"] == 200


def test_a_full_disk(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode", full)
        assert main(line(text, tmp_path / "tokens")) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
    assert main(line(text, tmp_path / "tokens")) == 0


def test_a_limit(text: Path, tmp_path: Path) -> None:
    assert main(line(text, tmp_path / "tokens", "--max-tokens", "300")) == 0
    tokens = json.loads((tmp_path / "tokens" / "tokens.json").read_text())["train"]["tokens"]
    assert 300 <= tokens < 1500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "stdlib"], "Invalid dataset: stdlib, expected text"),
        (["--max-tokens", "0"], "Invalid max_tokens: 0, expected a positive number"),
        (["--output-dir", "."], r"Invalid output_dir: \. exists"),
        (["--datset", "x"], "Invalid flag: --datset; did you mean --dataset"),
        (["--dataset", "./missing"], r"\./missing does not exist"),
    ],
)
def test_bad_lines(text: Path, tmp_path: Path, capsys: Any, change: list[str], message: str) -> None:
    assert main(line(text, tmp_path / "tokens", *change)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(message, error)


def test_broken_token_folders(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    assert main(line(text, out)) == 0
    with pytest.raises(UserError, match=r"Invalid tokenizer: .* was made with another one"):
        train_bpe(documents(50, 0), 320).save_pretrained(tmp_path / "tokenizer")
        load_data(options(out, tokenizer=str(tmp_path / "tokenizer")), vocab_size=8192)
    whole = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"Broken dataset: .*train\.bin has [\d,]+ bytes, expected"):
        load_data(options(out), vocab_size=8192)
    (out / "train.bin").unlink()
    with pytest.raises(UserError, match=r"Broken dataset: .*No such file"):
        load_data(options(out), vocab_size=8192)
    (out / "tokens.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has the format 99, expected 1"):
        load_data(options(out), vocab_size=8192)
