"""Links to files beside docs/ are links on a code host, and words on the site, which does not have the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+)(?:#[\w-]+)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    folder = Path(page.file.abs_src_path).parent

    def words(match: re.Match[str]) -> str:
        return match[0] if (folder / match[2]).resolve().is_relative_to(DOCS) else match[1]

    return LINK.sub(words, markdown)
