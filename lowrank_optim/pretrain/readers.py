"""The documents of one file, whatever its format, with what is wrong in it named by line.

JSON lines and plain text are read here, because a run that goes on behind a broken line has to know the line; tables
are read by ``datasets``.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lowrank_optim.pretrain.config import UserError

TEXT = (".txt", ".md")
JSON = (".json", ".jsonl")
# With the name of the reader in datasets.
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (*(kind + packed for kind in (*JSON, *TEXT) for packed in ("", ".gz", ".zst")), *TABLES)
# Characters after which a section of plain text ends at a blank line, and after which it ends wherever a line does.
SECTION, LONG_SECTION = 4096, 16384
# A line of more characters is not read: it is no document, and might be as long as the file.
LONGEST = 2**24
NEWLINE = "\n"


class Fault(str):
    """What is wrong with a document, and where."""

    __slots__ = ()


Document = tuple[int, str | Fault]


def read_documents(path: Path, field: str, start: int = 0, raw: BinaryIO | None = None) -> Iterator[Document]:
    """``(index, text)`` of the documents of one file from index ``start`` on; a :class:`Fault` where one is broken.

    The index is the number of a JSON line, array element or row, so that it survives the repair of another. Plain text
    has none but its own cuts: it is read in sections of about ``SECTION`` characters that end at blank lines.

    Args:
        path: a file with one of ``SUFFIXES``.
        field: which entry of a record is its text.
        start: the first index that is wanted.
        raw: the opened file, for those who want to know how far it has been read; tables are not read through it.

    Raises:
        UserError: the file cannot be opened or read.
        ImportError: a package that its format needs is not installed.
    """
    name = path.name.lower()
    if path.suffix.lower() in TABLES:
        yield from _table(path, field, start)
        return
    last = 0
    try:
        with raw or path.open("rb") as opened, _decoded(opened, name) as file:
            documents = _sections(file, path) if name.endswith(_packed(TEXT)) else _json(file, path, field, start)
            for last, text in documents:
                if last >= start:
                    yield last, text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield last + 1, Fault(f"{path} breaks off after document {last} ({error})")
    except OSError as error:
        # Only the system's own errors have a number; what Arrow says of a broken archive has none.
        if error.errno is not None:
            raise UserError(f"Cannot read {path}: {error.strerror}") from error
        yield last + 1, Fault(f"{path} breaks off after document {last} ({error})")


def _packed(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(kind + packed for kind in kinds for packed in ("", ".gz", ".zst"))


def _decoded(raw: BinaryIO, name: str) -> TextIO:
    source: Any = raw
    if name.endswith(".gz"):
        source = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        import pyarrow

        source = pyarrow.CompressedInputStream(raw, "zstd")
    # What is no UTF-8 becomes lone surrogates, for which every text is searched.
    return io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape")


def _json(file: TextIO, path: Path, field: str, start: int) -> Iterator[Document]:
    """One value a line, or all of them in one array."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if number == 1 and line.lstrip().startswith("["):
            yield from _array(line + file.read(), path, field)
            return
        where = f"{path} line {number}"
        if len(line) == LONGEST and not line.endswith(NEWLINE):
            while (rest := file.readline(LONGEST)) and not rest.endswith(NEWLINE):
                pass
            yield number, Fault(f"{where} is longer than {LONGEST:,} characters")
        elif number >= start and not line.isspace():
            try:
                record = json.loads(line.strip())
            except (ValueError, RecursionError) as error:
                yield number, Fault(f"{where} is no JSON ({error})")
            else:
                yield number, text_of(record, field, where)


def _array(text: str, path: Path, field: str) -> Iterator[Document]:
    decode = json.JSONDecoder().raw_decode
    at, number = _skip(text, text.index("[") + 1), 0
    while not text.startswith("]", at):
        number += 1
        where = f"{path} element {number}"
        try:
            record, at = decode(text, at)
            yield number, text_of(record, field, where)
            at = _skip(text, at)
            if not text.startswith((",", "]"), at):
                raise ValueError("neither a comma nor the end of the array follows")
        except (ValueError, RecursionError) as error:
            yield number, Fault(f"{where} is no JSON ({error}); the rest of the file is left out")
            return
        at = _skip(text, at + text.startswith(",", at))


def _skip(text: str, at: int) -> int:
    """The first character from ``at`` on that is no white space."""
    found = re.compile(r"\s*").match(text, at)
    return found.end() if found else at


def text_of(record: Any, field: str, where: str) -> str | Fault:
    """The text of a record, or what is wrong with it."""
    text = record.get(field) if isinstance(record, dict) else record
    if isinstance(text, str):
        found = _flaw(text)
        return Fault(f"{where} {found[0]}") if found else text
    if not isinstance(record, dict):
        return Fault(f"{where} is no object with a {field!r} string")
    if field in record:
        return Fault(f"{where} has a {field!r} that is no string")
    named = f" (its fields: {', '.join(list(record)[:8])}; --text-field names another)" if record else ""
    return Fault(f"{where} has no {field!r} string{named}")


def _flaw(text: str) -> tuple[str, int] | None:
    """What a tokenizer would choke on or learn nothing from, and at which character."""
    if not text or text.isspace():
        return "is empty", 0
    if len(text) > LONGEST:
        return f"is longer than {LONGEST:,} characters", 0
    if "\0" in text:
        return "holds a NUL byte", text.index("\0")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "is no UTF-8 or holds a lone surrogate", error.start
    return None


def _sections(file: TextIO, path: Path) -> Iterator[Document]:
    parts: list[str] = []
    size, index, line = 0, 0, 1
    while True:
        # A line of any length comes in pieces.
        part = file.readline(LONG_SECTION)
        parts.append(part)
        size += len(part)
        at_end = part.endswith(NEWLINE)
        if part and not (size >= SECTION and part.isspace()) and size < LONG_SECTION:
            continue
        text, rest = "".join(parts), ""
        if part and not at_end:
            # Within a line, between two words if there are any.
            cut = text.rfind(" ") if " " in text else len(text)
            text, rest = text[:cut], text[cut:]
        if text and not text.isspace():
            index += 1
            if found := _flaw(text):
                yield index, Fault(f"{path} line {line + text[: found[1]].count(NEWLINE)} {found[0]}")
            else:
                yield index, text.strip(NEWLINE)
        line += text.count(NEWLINE)
        parts, size = [rest], len(rest)
        if not part:
            return


def _table(path: Path, field: str, start: int) -> Iterator[Document]:
    from datasets import load_dataset

    skipped = index = max(start, 1) - 1
    try:
        kind = TABLES[path.suffix.lower()]
        # A name with brackets must not be taken for a pattern.
        files = glob.escape(str(path.absolute()))
        rows = load_dataset(kind, data_files=files, split="train", streaming=True)
        for index, record in enumerate(rows.skip(skipped), skipped + 1):
            yield index, text_of(record, field, f"{path} row {index}")
    # Its readers raise many unrelated classes.
    except Exception as error:
        yield index + 1, Fault(f"{path} cannot be read after row {index} ({' '.join(str(error).split())[:200]})")
