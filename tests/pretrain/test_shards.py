from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowrank_optim.pretrain import shards as module
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.shards import changes, find_shards, is_hub_name, name_of, split_of, stamps


def test_names_split_the_shards(shards: Path) -> None:
    found = find_shards(str(shards))
    assert [p.name[:8] for p in found.train] == ["c4-train"] * 3
    assert [p.name[:13] for p in found.validation] == ["c4-validation"]
    assert not found.test


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["a.jsonl", "train/a.txt", "training.md", "c4-train.00000-of-00003.json.gz", "data/train-0.parquet"]),
        # Within other words a name says something else.
        ("train", ["cross-validation-notes.txt", "latest.txt", "evaluations.txt", "contest/a.txt"]),
        # The outermost part counts.
        ("train", ["train/val_0.jsonl", "train/test/a.md"]),
        (
            "validation",
            ["validation/a.jsonl", "valid.json", "val.jsonl.zst", "dev/b/a.txt", "Val-1.txt", "my_dev.jsonl"],
        ),
        ("validation", ["c4-validation.00000-of-00008.json.gz", "data/validation-00000-of-00001-ab12cd.parquet"]),
        ("test", ["test.jsonl", "test/train.txt", "en/eval.json", "evaluation/x.md", "wikitext-103.test.txt"]),
    ],
)
def test_usual_names_of_splits(split: str, names: list[str]) -> None:
    assert {name: split_of(name.split("/")) for name in names} == dict.fromkeys(names, split)


def test_what_is_no_text_is_no_shard(tmp_path: Path) -> None:
    names = ["README.md", "dataset_info.json", "state.json", ".hidden.txt", ".git/a.txt", "cache-1.arrow", "a.csv"]
    for name in [*names, "b/notes.md", "test/c.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_shards(str(tmp_path))
    assert [name_of(tmp_path, path) for path in found.train] == ["b/notes.md"]
    assert [name_of(tmp_path, path) for path in found.test] == ["test/c.txt"]
    # A file that is named by itself is read whatever it is called.
    assert find_shards(str(tmp_path / "test" / "c.txt")).train == [tmp_path / "test" / "c.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", r"holds no \*.json, "),
        ("val/a.jsonl", "validation and test shards only"),
        ("test.jsonl", "validation and test shards only"),
    ],
)
def test_nothing_to_train_on(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=message):
        find_shards(str(tmp_path))


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv is none of \*\.json, "):
        find_shards(str(tmp_path / "a.csv"))


def test_names_meant_as_paths() -> None:
    assert not any(map(is_hub_name, ["./x", "/x", "../x", "~/x", "a/b/c", "x.jsonl", "stdlib"]))
    assert all(map(is_hub_name, ["c4", "allenai/c4", "allenai/c4:en"]))


def test_every_change_of_a_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HASHED", 1000)
    monkeypatch.setattr(module, "BLOCK", 10)
    sizes = {"same": 900, "edited": 900, "touched": 900, "longer": 900, "gone": 900, "long": 5000, "long-end": 5000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"a" * size)

    def now() -> dict[str, list[object]]:
        return stamps(tmp_path, sorted(tmp_path.iterdir()))

    before = now()
    assert changes(before, now()) == ([], [])
    for name, at in (("edited", 450), ("long", 57), ("long-end", 4999)):
        with (tmp_path / name).open("r+b") as file:
            file.seek(at)
            file.write(b"b")
    (tmp_path / "longer").write_bytes(b"a" * 901)
    (tmp_path / "gone").rename(tmp_path / "new")
    for name in ("touched", "long", "long-end"):
        os.utime(tmp_path / name, ns=(1, 1))
    # Byte 57 of the long file lies between the parts that are hashed: only its time tells.
    assert changes(before, now()) == (
        [
            "new is new",
            "gone is gone",
            "edited has another content of the same size",
            "long-end has another content of the same size",
            "longer had 900 bytes and has 901",
        ],
        ["long"],
    )
