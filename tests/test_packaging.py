"""What the package promises before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BLOCKED_IMPORT = """
import importlib.abc, importlib.machinery, sys

OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers", "tqdm", "transformers",
            "triton", "yaml", "matplotlib"}


class Block(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in OPTIONAL else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r} (blocked)", name=spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Block())
import torch
import lowrank_optim

p = torch.nn.Parameter(torch.ones(8, 6))
p.grad = torch.randn(8, 6)
lowrank_optim.GaLoreAdamW([p], rank=2).step()
"""


def run(code: str, *path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_import_and_a_step_need_torch_and_numpy_alone() -> None:
    result = run(BLOCKED_IMPORT)
    assert result.returncode == 0, result.stderr


def test_the_folder_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_distribution_named_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """From the repository root a regular package ``kernels`` must win over our folder of that name."""
    pytest.importorskip("transformers")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'the distribution'\n")
    code = "import sys; sys.path.insert(0, ''); import kernels; import lowrank_kernels; print(kernels.MARK)"
    result = run(code, str(tmp_path))
    assert result.stdout.strip() == "the distribution", result.stderr


def test_setup_finds_both_source_roots() -> None:
    setuptools = pytest.importorskip("setuptools")
    assert setuptools.find_packages(str(ROOT / "kernels")) == ["lowrank_kernels"]
    found = setuptools.find_packages(str(ROOT), include=["lowrank_optim*"])
    assert {"lowrank_optim", "lowrank_optim.optim", "lowrank_optim.ops"} <= set(found)
