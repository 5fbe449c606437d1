"""What a text file is, is found from its content as well as its name."""

import gzip
import json
import sys

import pytest
import zstandard

from sparity.calibration import text_files
from sparity.calibration.text import read_documents
from sparity.calibration.text_files import JSON_LINES
from sparity.errors import CorruptFile, InvalidInput

TEXTS = ["Once upon a time.", "There was a\u2028line.", "The end."]
LINES = "".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
LIST = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", [*JSON_LINES, ".json"])
def test_json_lines_under_any_of_their_names(tmp_path, suffix, packed):
    path = tmp_path / f"c4-validation{suffix}{packed}"
    path.write_bytes(PACKED[packed](LINES))
    assert read_documents(str(path)) == TEXTS


@pytest.mark.parametrize("packed", PACKED)
def test_a_list_and_a_plain_text(tmp_path, packed):
    (tmp_path / f"a.json{packed}").write_bytes(PACKED[packed](LIST))
    assert read_documents(str(tmp_path / f"a.json{packed}")) == TEXTS
    (tmp_path / f"a.txt{packed}").write_bytes(PACKED[packed](b"{a} brace\nand more"))
    assert read_documents(str(tmp_path / f"a.txt{packed}")) == ["{a} brace\nand more"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "part-00000", "a.data", "a.txt.gz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LINES, "looks like JSON lines, and its name says plain text: name it a?.*.jsonl"),
        (b"\n\n" + LINES.splitlines()[0], "looks like JSON lines"),
        (b"\xef\xbb\xbf" + LINES, "looks like JSON lines"),
        (LIST, r"looks like JSON, and .*\.json"),
    ],
)
def test_a_plain_text_that_looks_like_json_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InvalidInput, match=words):
        read_documents(str(path))


@pytest.mark.parametrize(
    "content", ["{not json}\n{}", "[1] A footnote.", '{"a": 1} is an object', "[Verse]\n[Chorus]", "[1, 2]"]
)
def test_a_plain_text_that_does_not(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert read_documents(str(tmp_path / "a.txt")) == [content]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ""])
def test_a_compressed_file_without_its_suffix(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for compress in (gzip.compress, zstandard.ZstdCompressor().compress):
        path.write_bytes(compress(LINES if suffix == ".jsonl" else b"plain words"))
        assert read_documents(str(path)) == (TEXTS if suffix == ".jsonl" else ["plain words"])


def test_several_frames_are_one_file(tmp_path):
    half = LINES.splitlines(keepends=True)
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)):
        (tmp_path / name).write_bytes(b"".join(compress(line) for line in half))
        assert read_documents(str(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("left", [3, 12, -1])
def test_a_truncated_file_is_refused(tmp_path, name, left):
    path = tmp_path / name
    path.write_bytes(PACKED[path.suffix](LINES * 100)[:left])
    with pytest.raises(CorruptFile, match=r"truncated|not compressed as its name says"):
        read_documents(str(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_and_one_that_is_not_compressed_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LINES)
    with pytest.raises(CorruptFile, match="not compressed as its name says"):
        read_documents(str(path))
    content = bytearray(PACKED[path.suffix](LINES * 100))
    content[len(content) // 2 :] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="truncated"):
        read_documents(str(path))


@pytest.mark.parametrize("packed", PACKED)
def test_more_text_than_memory_is_refused_while_it_is_read(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(text_files, "available_memory", lambda: 8 * 2**20)
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACKED[packed](b"a" * (4 * 2**20)))
    with pytest.raises(InvalidInput, match="more than fits into memory"):
        read_documents(str(path))


def test_without_the_package_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(PACKED[".zst"](LINES))
    with pytest.raises(InvalidInput, match=r"reading zstd needs zstandard: pip install 'sparity\[data\]'"):
        read_documents(str(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize("content", [b'{"text": "a"}\n{"text": ', b'{"text": "a"}\n[', b'["a"]\n["b"]', b"{"])
def test_json_that_is_neither_a_list_nor_lines(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptFile, match="is not JSON"):
        read_documents(str(tmp_path / "a.json"))


def test_one_object_is_no_list_of_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "a"}))
    with pytest.raises(InvalidInput, match="expected a list of texts or of objects, got dict"):
        read_documents(str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["none.ndjson", "none.jsonl.gz", "none.json.zst"])
def test_a_name_of_a_file_that_is_not_there(name):
    with pytest.raises(InvalidInput, match=f"text file {name} does not exist"):
        read_documents(name)


def test_parquet_is_known_by_its_content(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "rows")
    assert read_documents(str(tmp_path / "rows")) == TEXTS
