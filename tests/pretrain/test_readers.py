from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from lowrank_optim.pretrain import readers
from lowrank_optim.pretrain.config import UserError
from lowrank_optim.pretrain.readers import Fault, read_documents

from .conftest import documents

TEXTS = documents(5, 0)
LINES = "\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text} for text in TEXTS]).encode()


def zst(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def table(path: Path, texts: list[str], kind: str) -> None:
    pytest.importorskip("datasets")
    import pyarrow

    rows = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(rows, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n") + b"\r\n"),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", LINES),
        ("A.JSON.GZ", gzip.compress(b"\xef\xbb\xbf" + LINES, mtime=0)),
        ("a.json", ARRAY),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=2).encode() + b"\n"),
        ("a.json", json.dumps(TEXTS).encode()),
        ("a[1].parquet", b""),
        ("a.arrow", b""),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    if content:
        path.write_bytes(zst(content) if name.endswith(".zst") else content)
    else:
        table(path, TEXTS, name.rpartition(".")[2])
    assert list(read_documents(path, "text")) == list(enumerate(TEXTS, 1))
    assert list(read_documents(path, "text", 4)) == list(enumerate(TEXTS, 1))[3:]


def test_the_text_field_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"content": "x y", "url": "z"}) + "\n")
    assert list(read_documents(path, "content")) == [(1, "x y")]
    ((_, fault),) = read_documents(path, "text")
    assert isinstance(fault, Fault)
    assert fault == f"{path} line 1 has no 'text' string (its fields: content, url; --text-field names another)"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("breaks", ["\n\n", "\n", " "])
def test_plain_text_comes_in_sections(tmp_path: Path, name: str, breaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SECTION", 500)
    monkeypatch.setattr(readers, "LONG_SECTION", 2000)
    text = breaks.join(documents(100, 0)) + breaks
    content = ("\ufeff" + text).encode()
    pack = gzip.compress if name.endswith(".gz") else zst if name.endswith(".zst") else bytes
    (tmp_path / name).write_bytes(pack(content))
    found = list(read_documents(tmp_path / name, "text"))
    sections = [str(section) for _, section in found]
    assert " ".join(sections).split() == text.split()
    # At blank lines where there are any, else where a line ends, else between two words.
    least, most = (500, 800) if breaks == "\n\n" else (1700, 2300)
    assert all(least <= len(section) + 2 and len(section) <= most for section in sections[:-1])
    assert list(read_documents(tmp_path / name, "text", 3)) == found[2:]


GOOD = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "good", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": \n' + GOOD, 2, "line 2 is no JSON"),
        ("a.jsonl", GOOD + b'["x"]\n' + GOOD, 2, "line 2 is no object with a 'text' string"),
        ("a.jsonl", GOOD + b"17\n" + GOOD, 2, "line 2 is no object"),
        ("a.jsonl", GOOD + b'{"text": 1}\n' + GOOD, 2, "line 2 has a 'text' that is no string"),
        ("a.jsonl", GOOD + b'{"text": null}\n' + GOOD, 2, "line 2 has a 'text' that is no string"),
        ("a.jsonl", GOOD + b'{"text": ""}\n' + GOOD, 2, "line 2 is empty"),
        ("a.jsonl", GOOD + b'{"text": " \\n"}\n' + GOOD, 2, "line 2 is empty"),
        ("a.jsonl", GOOD + b"\n \n" + b"{}\n" + GOOD, 2, "line 4 has no 'text' string"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n' + GOOD, 2, "line 2 is no UTF-8 or holds a lone surrogate"),
        ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n' + GOOD, 2, "line 2 is no UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "a\\u0000b"}\n' + GOOD, 2, "line 2 holds a NUL byte"),
        ("a.jsonl", GOOD + b"\0" * 64 + b"\n" + GOOD, 2, "line 2 is no JSON"),
        ("a.jsonl", GOOD + b'{"a":' * 99999 + b"\n" + GOOD, 2, "line 2 is no JSON"),
        ("a.jsonl", GOOD + b'{"text": "' + b"x" * 3000 + b'"}\n' + GOOD, 2, "line 2 is longer than 2,000 characters"),
        ("a.jsonl", GOOD + b'{"text": "' + b"x" * 3000, 1, "line 2 is longer than 2,000 characters"),
        ("a.json", b'[{"text": "x"}, {"text": 1}, {"text": "x"}]', 2, "element 2 has a 'text' that is no string"),
        ("a.json", b'[{"text": "x"}, {"text": "x', 1, "element 2 is no JSON"),
        ("a.json", b'[{"text": "x"} {"text": "x"}]', 1, "element 1 is no JSON .neither a comma"),
        ("a.json.gz", b"plain text", 0, "breaks off after document 0"),
        ("a.json.gz", gzip.compress(GOOD * 9999, mtime=0)[:-20], None, "breaks off after document"),
        ("a.json.gz", gzip.compress(GOOD, mtime=0)[:-5] + b"12345", 1, "breaks off after document 1"),
        ("a.txt", b"caf\xe9", 0, "line 1 is no UTF-8"),
        ("a.txt", "text".encode("utf-16"), 0, "line 1 holds a NUL byte"),
        ("a.txt", b"one\ntwo\nth\0ree\n", 0, "line 3 holds a NUL byte"),
    ],
)
def test_faults_are_named_and_the_rest_is_read(
    tmp_path: Path, name: str, content: bytes, good: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST", 2000 if b"x" * 3000 in content else 2**20)
    path = tmp_path / name
    path.write_bytes(content)
    found = [text for _, text in read_documents(path, "text")]
    faults = [text for text in found if isinstance(text, Fault)]
    assert len(faults) == 1
    assert faults[0].startswith(str(path))
    assert re.search(message, faults[0])
    texts = [text for text in found if not isinstance(text, Fault)]
    assert set(texts) <= {"x"}
    assert good is None or len(texts) == good


@pytest.mark.parametrize("kind", ["parquet", "jsonl.zst"])
def test_half_a_file_in_a_foreign_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        table(path, TEXTS, "parquet")
    else:
        path.write_bytes(zst(GOOD * 9999))
    path.write_bytes(path.read_bytes()[:-10])
    *_, (_, fault) = read_documents(path, "text")
    assert isinstance(fault, Fault)
    assert str(path) in fault


def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match=r"Cannot read .*a\.jsonl: Is a directory"):
        list(read_documents(tmp_path / "a.jsonl", "text"))
