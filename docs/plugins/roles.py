"""Docstrings as Markdown: Sphinx roles become code or links, and ``::`` becomes the colon before a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`([\w.]+)`")
PACKAGES = ("lowrank_optim", "lowrank_optim.nn")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object once its package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package."""
        public = {name: f"{path}.{name}" for path in PACKAGES for name in _names(pkg, path)}
        self._rewrite(pkg, public)

    def _rewrite(self, found: griffe.Object, public: dict[str, str]) -> None:
        if found.docstring is not None:
            found.docstring.value = _as_markdown(found.docstring.value, public)
        for member in found.members.values():
            if not member.is_alias:
                self._rewrite(member, public)  # type: ignore[arg-type]


def _names(pkg: griffe.Module, path: str) -> list[str]:
    if pkg.path != path.partition(".")[0]:
        return []
    module = pkg if path == pkg.path else pkg[path.partition(".")[2]]
    return [str(name) for name in module.exports or []]


def _as_markdown(text: str, public: dict[str, str]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        return f"[`{name}`][{public[name]}]" if name in public else f"`{match[1]}`"

    return re.sub(r"(?<=\S)::\n\n|\s::\n\n", ":\n\n", ROLE.sub(link, text))
