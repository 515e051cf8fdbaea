"""What the package promises before anything runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from pathlib import Path

import pytest

import lowrank_optim

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

import train_llama

assert train_llama.main(["--help"]) == 0
"""


def run(code: str, *path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_import_a_step_and_the_help_need_torch_and_numpy_alone() -> None:
    result = run(BLOCKED_IMPORT)
    assert result.returncode == 0, result.stderr
    assert "--optimizer-args" in result.stdout


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


def test_the_version_stands_in_one_place() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "version=VERSION" in setup
    for name in ("setup.py", "pyproject.toml", "CITATION.cff"):
        assert lowrank_optim.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert newest == lowrank_optim.__version__


def test_citation_has_what_the_format_requires() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= cited.keys()
    assert cited["license"] == "Apache-2.0" and all(author["name"] for author in cited["authors"])


def requirements_of(*names: str) -> dict[str, metadata.Distribution]:
    """The installed distributions that these need, themselves included, by their names."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # Of another platform or of an extra.
            continue
        needs = [need for need in found[name].requires or () if "extra ==" not in need]
        waiting += [re.match(r"[\w.-]+", need)[0] for need in needs]
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with torch, numpy, what they need, and our wheel, which was built from our source distribution.

    Nothing is downloaded: the packages are links to those that are installed here.
    """
    pytest.importorskip("setuptools", minversion="77", reason="builds want lowrank-optim[test]")
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "source"
    for name in ("lowrank_optim", "kernels", "docs", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, source)
    shutil.copy(ROOT / "LICENSE", source)
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    isolated = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", "-q", *isolated, "--no-build-isolation", "-w", folder, sdist], check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "-q", *isolated, wheel], check=True, capture_output=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    for distribution in requirements_of("torch", "numpy").values():
        # Of a package all, of a file itself; scripts stay where they are.
        for top in {path.parts[0] for path in distribution.files or () if not path.parts[0].startswith("..")}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    return folder


def in_clean(clean: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    program, *rest = command
    return subprocess.run(
        [clean / "venv" / "bin" / program, *rest],
        env=environment,
        cwd=clean,
        capture_output=True,
        text=True,
        check=False,
    )


ALL_OPTIMIZERS = """
import inspect, pathlib, sys
import torch
import lowrank_optim
from lowrank_optim import nn

assert pathlib.Path(lowrank_optim.__file__).is_relative_to(sys.prefix), lowrank_optim.__file__
layers = {"SSTAdamW": (nn.SST, lowrank_optim.spectral_groups), "LOROAdamW": (nn.LORO, lowrank_optim.factor_groups)}
steps = 0
for name in lowrank_optim.__all__:
    cls = getattr(lowrank_optim, name)
    if not isinstance(cls, type):
        continue
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(3)))
    kind, groups = layers.get(name, (None, lowrank_optim.low_rank_groups))
    if kind:
        nn.convert(model, kind(rank=4), targets=("0", "1"))
    rank = {"rank": 4} if "rank" in inspect.signature(cls).parameters else {}
    optimizer = cls(groups(model), lr=1e-2, **rank)
    for _ in range(2):
        model(torch.randn(3, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    steps += 1
print(steps, lowrank_optim.__version__)
"""


@pytest.mark.slow
def test_wheel_needs_torch_and_numpy_alone(clean: Path) -> None:
    missing = in_clean(clean, "python", "-c", "import transformers")
    assert "No module named 'transformers'" in missing.stderr
    result = in_clean(clean, "python", "-c", ALL_OPTIMIZERS)
    assert result.returncode == 0, result.stderr
    classes = [name for name in lowrank_optim.__all__ if isinstance(getattr(lowrank_optim, name), type)]
    assert result.stdout.split() == [str(len(classes)), lowrank_optim.__version__]
    types = (path for path in (clean / "venv").rglob("py.typed") if path.parent.name.startswith("lowrank_"))
    assert sorted(path.parent.name for path in types) == ["lowrank_kernels", "lowrank_optim"]


# The status of each line, in one process: most of its time is the import of torch.
LINES = """
import sys
from lowrank_optim.cli.main import main as train
from lowrank_optim.memory.cli import main as memory

for line in sys.argv[1:]:
    command, *rest = line.split()
    print("status", {"lowrank-train": train, "lowrank-memory": memory}[command](rest))
"""


@pytest.mark.slow
def test_what_needs_more_names_the_extra(clean: Path) -> None:
    (clean / "text").mkdir()
    (clean / "text" / "one.txt").write_text("a text")
    # What a model's folder has.
    (clean / "text" / "config.json").write_text("{}")
    (clean / "text" / "model.safetensors").write_text("")
    lines = [
        "lowrank-train",
        "lowrank-train --dry-run",
        "lowrank-train --config llama_7b_24gb",
        "lowrank-train generate text",
        "lowrank-train evaluate text",
        "lowrank-train tokenize --dataset text --output-dir tokens",
        "lowrank-memory estimate --model llama_60m",
        "lowrank-memory simulate --model llama_60m",
        "lowrank-memory compare",
    ]
    result = in_clean(clean, "python", "-c", LINES, *lines)
    assert result.stdout.split() == ["status", "2"] * len(lines), result.stderr
    said = result.stderr.splitlines()
    assert len(said) == len(lines) and all("pip install 'lowrank-optim[train]'" in line for line in said), said


@pytest.mark.slow
def test_commands_that_need_nothing_more(clean: Path) -> None:
    for command in ("lowrank-train", "lowrank-memory"):
        assert in_clean(clean, command, "--version").stdout.split() == [command, lowrank_optim.__version__]
    lines = ["lowrank-train list", "lowrank-memory papers", "lowrank-memory plan --gpu 24 --model llama_7b"]
    result = in_clean(clean, "python", "-c", LINES, *lines)
    assert result.stdout.count("status 0") == 3 and "llama_7b_24gb" in result.stdout, result.stderr


@pytest.mark.slow
def test_source_distribution_has_what_a_reader_looks_for(clean: Path) -> None:
    (sdist,) = clean.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "train_llama.py", "constraints.txt"} <= names
    assert {"docs/integrations.md", "examples/peft_lora.py", "kernels/lowrank_kernels/gram.py"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "build/")) for name in names)
