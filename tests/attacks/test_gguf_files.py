"""GGUF files that are damaged or hostile: one clear sentence, and no memory for what they only claim to hold."""

import struct
import tracemalloc

import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_models import write
from sparity.checkpoints.gguf_header import read_header
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.models.transformers import locate

HUGE = 2**63 - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file that is in order."""
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", kind=Type.Q8_0).read_bytes()


def text(words):
    return struct.pack("<Q", len(words)) + words.encode()


def file_of(values=(), tensors=(), data=b"", version=3, counts=None):
    """A GGUF file built by hand: values are (key, type, bytes), tensors (name, sides, type, offset)."""
    tensor_count, value_count = counts or (len(tensors), len(values) + 1)
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, value_count)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for key, kind, content in values:
        head += text(key) + struct.pack("<I", kind) + content
    for name, sides, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides) + struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % 32) + data


MATRIX = ("blk.0.attn_q.weight", (32, 4), 0, 0)
HOSTILE = {
    "another magic": (b"GGML" + b"\0" * 64, CorruptFile, "is not a GGUF file"),
    "empty": (b"", CorruptFile, "is not a GGUF file"),
    "magic alone": (b"GGUF", CorruptFile, "ends in the middle of its header"),
    "old version": (file_of(version=1), InvalidInput, "GGUF version 1"),
    "big endian": (file_of(version=3 << 24), InvalidInput, "big-endian"),
    "countless values": (file_of(counts=(0, HUGE)), CorruptFile, "is there twice|ends in the middle"),
    "countless tensors": (file_of(counts=(HUGE, 1)), CorruptFile, "0 dimensions|ends in the middle"),
    "endless text": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE), CorruptFile, "ends in the middle"),
    "endless list": (file_of([("a", 9, struct.pack("<IQ", 10, HUGE))]), CorruptFile, "ends in the middle"),
    "list of lists": (file_of([("a", 9, struct.pack("<IQ", 9, 1))]), CorruptFile, "a list of values of type 9"),
    "no such type": (file_of([("a", 77, b"")]), CorruptFile, "a value of type 77"),
    "twice": (file_of([("a", 0, b"1"), ("a", 0, b"2")]), CorruptFile, "a is there twice"),
    "no tensors": (file_of(), InvalidInput, "holds no tensors"),
    "five sides": (file_of(tensors=[("w", (1, 1, 1, 1, 1), 0, 0)]), CorruptFile, "5 dimensions"),
    "an empty side": (file_of(tensors=[("w", (32, 0), 0, 0)]), CorruptFile, "cannot be cut into blocks"),
    "half a block": (file_of(tensors=[("w", (33, 1), 8, 0)]), CorruptFile, "blocks of 32"),
    "unknown type of tensor": (file_of(tensors=[("w", (32, 1), 999, 0)]), InvalidInput, "quantised as type 999"),
    "absurd size": (file_of(tensors=[("w", (HUGE // 2, 4), 0, 0)]), CorruptFile, "is truncated"),
    "offset beyond": (file_of(tensors=[("w", (32, 1), 0, HUGE)]), CorruptFile, "is truncated"),
    "overlapping": (
        file_of(tensors=[MATRIX, ("b", *MATRIX[1:]), ("c", *MATRIX[1:])], data=b"\0" * 512),
        CorruptFile,
        "its tensors overlap",
    ),
    "absurd context": (
        file_of([("llama.context_length", 10, struct.pack("<Q", HUGE))], [MATRIX], b"\0" * 512),
        CorruptFile,
        "llama.context_length is",
    ),
    "no alignment": (
        file_of([("general.alignment", 4, struct.pack("<I", 0))], [MATRIX], b"\0" * 512), CorruptFile, "alignment is 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_sentence_and_without_memory(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    content, error, words = HOSTILE[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(SparityError, match=words) as caught:
        locate(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(caught.value) is error
    assert str(file) in str(caught.value)
    assert peak < 20e6
    assert [path.name for path in (tmp_path / "cache/gguf").iterdir() if path.suffix != ".lock"] == []


def test_without_an_architecture(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(CorruptFile, match="names no architecture"):
        read_header(file)


def test_an_architecture_that_nobody_knows(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(whole.replace(b"llama", b"lalma"))
    with pytest.raises(
        InvalidInput, match=r"transformers cannot read the GGUF file .* architecture lalma is not supported"
    ):
        locate(file)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_wherever_it_is_cut_off(whole, tmp_path_factory, share):
    file = tmp_path_factory.mktemp("cut") / "model.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorruptFile):
        read_header(file)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_whatever_byte_of_the_header_is_wrong_it_is_read_or_refused(whole, tmp_path_factory, place, value):
    file = tmp_path_factory.mktemp("wrong") / "model.gguf"
    at = int(4000 * place)
    file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    try:
        header = read_header(file)
    except SparityError:
        return
    assert header.tensors
