"""Files from elsewhere: nothing in them runs, nothing outside of their folder is read, nothing hangs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import train_llama
from lowrank_optim.pretrain import checkpoint, manifest


class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, shards: Path) -> tuple[list[str], Path]:
    """The flags of a run and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    line = (
        f"--model {tiny_model} --dataset {shards} --seq-len 24 --batch-size 5 --accumulate 1 --max-steps 1"
        " --eval-batches 1 --sample-tokens 0 --optimizer-args rank=4"
    ).split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        assert train_llama.main([*line, "--output-dir", str(folder)]) == 0
    return line, folder / "checkpoint-1"


def seal(folder: Path, **changes: Any) -> None:
    """Give a checkpoint the digests of the files that it has now, as one who plants them would."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").unlink()
    names = [name for name in state["files"] if (folder / name).is_file()]
    state["files"] = {name: manifest.of_folder(folder)[name] for name in names}
    state |= changes
    del state["digest"]
    state["digest"] = manifest.of_values(state)
    (folder / "state.json").write_text(json.dumps(state))


def resume(saved: tuple[list[str], Path], run: Path) -> int:
    line = [*saved[0], "--max-steps", "2", "--output-dir", str(run), "--resume", "auto"]
    return train_llama.main(line)


@pytest.mark.parametrize("name", ["optimizer.pt", "processes.pt"])
@pytest.mark.parametrize("how", ["torch", pytest.param("pickle", marks=pytest.mark.slow)])
def test_nothing_is_unpickled(saved: tuple[list[str], Path], tmp_path: Path, capfd: Any, name: str, how: str) -> None:
    folder, proof = tmp_path / "checkpoint-1", tmp_path / "proof"
    shutil.copytree(saved[1], folder)
    if how == "torch":
        torch.save({"optimizer": Malicious(proof)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Malicious(proof)))
    seal(folder)
    assert checkpoint.damage(folder) is None
    assert resume(saved, tmp_path) == 2
    err = capfd.readouterr().err
    assert "Broken checkpoint" in err and "Traceback" not in err
    assert not proof.exists()


def test_what_is_no_plain_file_is_not_opened(saved: tuple[list[str], Path], tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved[1], folder)
    # Opening it would wait for ever.
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert resume(saved, tmp_path) == 2
    assert "model.safetensors is missing" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["../../secret", "/dev/zero", "a/../../b"])
def test_a_manifest_does_not_lead_elsewhere(
    saved: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved[1], folder)
    seal(folder, files={name: {"size": 0, "xxh3": ""}})
    monkeypatch.setattr(manifest, "of_file", lambda path: pytest.fail(f"{path} was read"))
    assert "lies outside" in str(checkpoint.damage(folder))


def test_processes_without_their_keys(saved: tuple[list[str], Path], tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved[1], folder)
    for content in ([], [{}], {}, [{"random": {"python": 1}, "data": None}]):
        torch.save(content, folder / "processes.pt")
        seal(folder)
        assert resume(saved, tmp_path) == 2
        err = capfd.readouterr().err
        assert "Broken checkpoint" in err and "Traceback" not in err


def test_yaml_makes_no_objects(tmp_path: Path, capfd: Any) -> None:
    file, proof = tmp_path / "run.yaml", tmp_path / "proof"
    file.write_text(
        f"seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{proof}']]\n"
    )
    assert train_llama.main(["--config", str(file), "--dry-run"]) == 2
    assert "not valid YAML" in capfd.readouterr().err and not proof.exists()


def test_code_beside_a_tokenizer_is_not_run(
    saved: tuple[list[str], Path], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, proof = tmp_path / "tokenizer", tmp_path / "proof"
    folder.mkdir()
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\nclass Mine: pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    # Somebody who would say yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    line = [*saved[0], "--tokenizer", str(folder), "--output-dir", str(tmp_path / "run")]
    assert train_llama.main(line) == 2
    assert "Cannot load tokenizer" in capfd.readouterr().err and not proof.exists()
