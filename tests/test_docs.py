"""README and docs: every block of code runs, every command is one, every link leads somewhere, the site builds."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import nn as layers
from lowrank_optim.cli.main import COMMANDS
from lowrank_optim.memory import cli as memory_cli
from lowrank_optim.pretrain.build import settle
from lowrank_optim.pretrain.command_line import FIELDS, parse_known, parse_options
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.optimizers import accepted_arguments, parse_optimizer_args

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Larger than the rank of 128 that most examples have.
SIZES = {
    "hidden_size": 160, "intermediate_size": 176, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 16,
}  # fmt: skip


class Block(NamedTuple):
    page: Path
    section: int
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for m in FENCE.finditer(text):
        before = text[: m.start()]
        found.append(Block(page, before.count("\n## "), before.count("\n") + 1, m[1], m[2]))
    return found


def in_language(language: str) -> dict[Path, list[Block]]:
    found = {page: [b for b in blocks_of(page) if b.language == language] for page in PAGES}
    return {page: blocks for page, blocks in found.items() if blocks}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def batch_of(position: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(SIZES["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(position))
    return {"input_ids": tokens, "labels": tokens}


class Constant:
    """Stands for any scheduler in a block that shows where one is called."""

    def step(self) -> None:
        pass


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted beside a model, which is a new one in every section."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    return {
        "torch": torch,
        "loader": [batch_of(i) for i in range(2)],
        "dataset": [batch_of(0)],
        "updates": [[batch_of(i) for i in range(4)]],
        "scheduler": Constant(),
    }


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", in_language("python"), ids=name_of)
def test_python_blocks_run_one_after_the_other(page: Path, namespace: dict[str, Any], tmp_path: Path) -> None:
    source = page.read_text(encoding="utf-8")
    alone = one_process(tmp_path) if "torch.distributed" in source else contextlib.nullcontext()
    with alone:
        section = -1
        for block in in_language("python")[page]:
            if block.section != section:
                namespace["model"], section = tiny_model(), block.section
            with contextlib.redirect_stdout(io.StringIO()):
                # Names and lines of a traceback are those of the page.
                code = compile("\n" * block.line + block.text, str(page), "exec")
                exec(code, namespace)
            print(f"ran {block.place}")


def commands_of(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines if not line.startswith("#") for part in line.split("&&") if part.strip()]


def check(command: str) -> None:
    """Raise where a command is not one, without running it."""
    # What stands in brackets may be left out.
    words = [word.strip("[]") for word in shlex.split(command)]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "train_llama.py"] or words[:3] == ["python", "-m", "lowrank_optim.cli.main"]:
        words = ["lowrank-train", *words[2 + (words[1] == "-m") :]]
    if words[0] == "lowrank-train":
        check_training(words[1:])
    elif words[0] == "lowrank-memory":
        given = parse_known(memory_cli._parser(), words[1:], ())
        if "optimizer_args" in given:
            check_arguments(given.optimizer, given.optimizer_args)
        if given.command in ("estimate", "simulate"):
            settle(memory_cli._job(given))
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    else:
        raise AssertionError(f"unknown command {words[0]!r}")


def check_training(words: list[str]) -> None:
    if words and words[0] in COMMANDS and words[0] != "train":
        # Their parsers are made where they run: it is the flags that are looked for.
        module, _, _ = COMMANDS[words[0]][0].partition(":")
        check_flags(module, words[1:])
        return
    options = parse_options(words)
    if options.optimizer != "auto":
        check_arguments(options.optimizer, options.optimizer_args)


def check_arguments(optimizer: str, given: list[str]) -> None:
    unknown = set(parse_optimizer_args(given)) - {*accepted_arguments(optimizer), "targets"}
    assert not unknown, f"{optimizer} does not take {unknown}"


def check_module(module: str, words: list[str]) -> None:
    if module not in ("pip", "pytest"):
        check_flags(module, words)


def check_flags(module: str, words: list[str]) -> None:
    """That a module is there, and that it, or its package, names the flags."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    assert spec.origin is not None
    file = Path(spec.origin)
    sources = [*file.parent.glob("*.py")] if spec.submodule_search_locations else [file]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for word in words:
        flag = word.partition("=")[0]
        known = f'"{flag}"' in text or flag[2:].replace("-", "_") in FIELDS
        assert not flag.startswith("-") or known, f"{module} has no {flag}"


@pytest.mark.parametrize("page", in_language("bash"), ids=name_of)
def test_commands_are_commands(page: Path) -> None:
    for block in in_language("bash")[page]:
        for command in commands_of(block):
            try:
                check(command)
            except UserError as error:
                raise AssertionError(f"{block.place}: {command}: {error}") from error
            print(f"checked {block.place}: {command}")


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(UserError, match="--optimiser"):
        check("lowrank-train --optimiser GaLoreAdamW")
    with pytest.raises(UserError, match="--rank"):
        check("lowrank-memory estimate --rank 5")
    with pytest.raises(AssertionError, match="does not take"):
        check("lowrank-memory estimate --optimizer Muon --optimizer-args rank=5")
    with pytest.raises(AssertionError, match="has no --loud"):
        check("lowrank-train generate runs/one --loud")
    with pytest.raises(AssertionError, match="no module"):
        check("python -m benchmarks.nothing")


def test_nothing_but_known_languages() -> None:
    """A block without a language is neither run nor checked: it is what a program prints."""
    assert {b.language for page in PAGES for b in blocks_of(page)} <= {"python", "bash", "text"}


def test_the_first_commands_of_the_readme() -> None:
    """What .ci/run and a stranger take from it."""
    first, second = in_language("bash")[ROOT / "README.md"][:2]
    assert first.text == 'python -m pip install -c constraints.txt -e ".[train]" && python train_llama.py\n'
    assert second.text == 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest\n'


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def optimizer_classes() -> list[str]:
    return [name for name in lowrank_optim.__all__ if inspect.isclass(getattr(lowrank_optim, name))]


def test_every_public_name_is_documented_once() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    documented = re.findall(r"^::: (lowrank_optim(?:\.nn)?\.\w+)$", text, re.MULTILINE)
    public = [f"lowrank_optim.{name}" for name in lowrank_optim.__all__]
    assert sorted(documented) == sorted([*public, *(f"lowrank_optim.nn.{name}" for name in layers.__all__)])
    triples = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    papers = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    for name in optimizer_classes():
        assert f"`{name}`" in triples
        assert f"`{name}`" in papers


M, N, R = 96, 64, 16
# docs/methods/index.md, with b = 4 and a weight in fp32.
STATE_BYTES = {
    "GaLoreAdamW": 8 * M * R + 4 * N * R,
    "GoLoreAdamW": 8 * M * R + 4 * N * R,
    "FiraAdamW": 8 * M * R + 4 * N * R,
    "APOLLOAdamW": 8 * M * R,
    "DCTAdamW": 8 * M * R + 8 * R,
    "FRUGALAdamW": 8 * M * R + 8 * R,
    "Trion": 4 * M * N + 8 * R,
    "LDAdamW": 8 * M * R + 4 * N * R + 4 * M * N,
    "SinkGD": 0,
    "SCALE": 0,
    "RACS": 4 * (M + N + 1),
    "Muon": 4 * M * N,
    "FOAM": 8 * M * N // 4,
    "LoRAPre": 8 * (M + N) * R,
    "Alice": 8 * M * R + 4 * N * R + 4 * (R * R + M),
}


@pytest.mark.parametrize("name", STATE_BYTES)
def test_the_bytes_of_a_state_are_those_of_the_page(name: str) -> None:
    weight = nn.Parameter(torch.randn(M, N))
    cls = getattr(lowrank_optim, name)
    optimizer = cls([weight], **({"rank": R} if "rank" in inspect.signature(cls).parameters else {}))
    weight.grad = torch.randn(M, N)
    optimizer.step()
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    # The norm that a limiter remembers is one number.
    assert sum(t.nbytes for t in tensors if t.numel() > 1) == pytest.approx(STATE_BYTES[name], abs=4)


def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(needed, reason="the site is built where the extra 'docs' is installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        # From the disk and without a network: nothing may be loaded from elsewhere.
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"(https?://[^\"]+)", text)
        assert not [url for url in loaded if "canonical" not in url], page
        # A role or an unresolved reference of a docstring.
        assert not re.search(r":(?:class|func|meth|mod):`|\]\[lowrank_optim", text), page
