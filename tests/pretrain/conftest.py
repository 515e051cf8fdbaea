from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

WORDS = ("the", "a", "one", "small", "large", "red", "blue", "cat", "dog", "tree", "river", "runs", "sees", "under")

# 14 thousand parameters.
MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}


def documents(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) + "." for _ in range(number)]


def write_shard(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "url": "http://example.org"}) + "\n" for text in texts)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of :data:`MODEL`."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training shards and one for validation, in C4's format."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_shard(folder / f"c4-train.{number:05}-of-00003.json.gz", documents(20, number))
    write_shard(folder / "c4-validation.00000-of-00001.json.gz", documents(10, 99))
    return folder
