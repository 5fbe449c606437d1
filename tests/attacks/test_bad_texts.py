"""Texts and token files that cannot be used; a pickle in one of them is never opened."""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch

import sparity
from sparity.calibration.text import read_documents
from sparity.calibration.tokens import read_tokens
from sparity.errors import CorruptFile, InvalidInput
from sparity.quality.agreement import compare


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def header(shape):
    """A .npy file that claims a shape and holds nothing."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


IDS = np.ones((20, 30), int)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (npy(IDS.astype(float)), InvalidInput, "token ids must be an array of integers, got float64"),
        (npy(IDS > 0), InvalidInput, "token ids must be an array of integers, got bool"),
        (npy(IDS[0]), InvalidInput, r"expected token ids of shape \[samples, length\], got \[30\]"),
        (npy(IDS[:0]), InvalidInput, r"got \[0, 30\]"),
        (npy(IDS)[:-50], CorruptFile, "is not a numpy array of token ids"),
        (npy(IDS)[:20], CorruptFile, "is not a numpy array of token ids"),
        (npy(IDS)[:4], CorruptFile, "is not a numpy array of token ids"),
        (b"", CorruptFile, "is not a numpy array of token ids"),
        (b"PK\x03\x04 and no zip", CorruptFile, "is not a numpy array of token ids"),
        (b"1 2 3", CorruptFile, "is not a numpy array of token ids"),
        (header("(900000000, 900000000)"), CorruptFile, "is not a numpy array of token ids"),
        (header("(-2, -3)"), CorruptFile, "is not a numpy array of token ids"),
        (header("(2**3, 3)"), CorruptFile, "is not a numpy array of token ids"),
    ],
    ids=str,
)
def test_files_that_hold_no_token_ids(recipe, refused, tmp_path, content, error, words):
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    refused(recipe(calibration={"tokens": str(path)}), error, f"{path}(:| is not) ?", words)


@pytest.mark.parametrize("as_array", [True, False])
def test_a_pickle_is_never_opened(tmp_path, as_array):
    mark = tmp_path / "pwned"
    evil = Evil(str(mark))
    path = tmp_path / "ids.npy"
    path.write_bytes(npy(np.array([[evil]], dtype=object), allow_pickle=True) if as_array else pickle.dumps(evil))
    with pytest.raises(CorruptFile, match="is not a numpy array of token ids"):
        read_tokens(path, dimensions=2)
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))  # the pickle does work
    assert mark.exists()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.full((2, 8), 97), "token ids run from 97 to 97, but the model's vocabulary has 97 tokens"),
        (np.full((2, 8), -1), "token ids run from -1 to -1"),
        (np.full((2, 8), 2**64 - 5, dtype=np.uint64), "token ids run from -5 to -5"),
        (np.zeros((2, 65), int), "65 tokens per window are more than the model's context of 64"),
    ],
    ids=["beyond", "negative", "overflow", "long"],
)
def test_calibration_ids_that_the_model_cannot_take(recipe, refused, tmp_path, ids, words):
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    refused(recipe(calibration={"tokens": str(path)}), InvalidInput, words)


@pytest.mark.parametrize(
    ("ids", "window", "words"),
    [
        (np.full(80, 97), None, "token ids run from 97 to 97"),
        (np.full(80, -1), None, "token ids run from -1 to -1"),
        (np.zeros(63, int), None, "the text has 63 tokens, less than one window of 64: use a smaller window"),
        (np.zeros(80, int), 65, "65 tokens per window are more than the model's context of 64"),
        (np.zeros((2, 80), int), None, r"expected token ids of shape \[length\], got \[2, 80\]"),
    ],
    ids=["beyond", "negative", "short", "long", "flat"],
)
def test_measured_ids_that_the_model_cannot_take(recipe, refused, tmp_path, ids, window, words):
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    refused(recipe(measure={"perplexity": [str(path)], "window": window, "speed": None}), InvalidInput, words)


def test_small_unsigned_ids_are_measured(recipe, tmp_path, token_files, family_models):
    wide = np.load(token_files["text"])
    values = [sparity.perplexity(family_models["llama"], ids, 64) for ids in (wide, wide.astype(np.uint16))]
    assert values[0] == values[1]


@pytest.mark.parametrize("ids", ["abc", [1.0, 2.0], [[1], [1, 2]], [[1, 2]], torch.ones(99, dtype=torch.bool)])
def test_perplexity_of_no_ids(family_models, ids):
    with pytest.raises(InvalidInput, match="token ids must be 1-D integers, got"):
        sparity.perplexity(family_models["llama"], ids, 2)


@pytest.mark.parametrize("window", [0, 1, 65])
def test_perplexity_in_a_window_that_does_not_fit(family_models, window):
    with pytest.raises(InvalidInput, match=f"window {window}: it must be at least 2 and at most .* 64 tokens"):
        sparity.perplexity(family_models["llama"], list(range(97)), window)


def test_a_perplexity_too_large_for_a_number(family_models):
    from copy import deepcopy

    model = deepcopy(family_models["llama"])
    model.lm_head.weight.data *= 1e6
    ids = list(range(64))
    assert sparity.perplexity(model, ids, 64) == float("inf")
    assert compare(family_models["llama"], model, ids, 64).perplexity == float("inf")
    model.lm_head.weight.data *= float("nan")
    assert np.isnan(sparity.perplexity(model, ids, 64))


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.txt", b"", InvalidInput, "a.txt holds no text"),
        ("a.txt", b" \n\t\r\n ", InvalidInput, "a.txt holds no text"),
        ("a.txt", b"abc\xff", CorruptFile, r"a.txt is not UTF-8 text \(invalid start byte at byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text":\n', CorruptFile, "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, CorruptFile, "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}', InvalidInput, r'row 0: no field "text"; did you mean "txt"\?.*fields: txt'),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', InvalidInput, "a.jsonl, row 1: expected text, got NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}', InvalidInput, "a.jsonl, row 0: no valid text, half a surrogate pair"),
        ("a.json", b'{"text": "a"}', InvalidInput, "a.json: expected a list of texts or of objects, got dict"),
        ("a.json", b"[]", InvalidInput, "a.json holds no text"),
        ("a.json", b"[", CorruptFile, "a.json is not JSON"),
        ("a.parquet", b"PAR1 and no more", CorruptFile, "a.parquet is not a parquet file"),
    ],
    ids=lambda value: str(value)[:25],
)  # fmt: skip
def test_text_files_without_usable_text(tmp_path, name, content, error, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        read_documents(str(tmp_path / name))
    assert type(caught.value) is error


def test_a_parquet_file_damaged_inside(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": ["a" * 50, "b" * 50]}), tmp_path / "a.parquet")
    assert read_documents(str(tmp_path / "a.parquet")) == ["a" * 50, "b" * 50]
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:8] + b"\xff" * 24 + content[32:])
    with pytest.raises(CorruptFile, match=r"a\.parquet is not a parquet file, or damaged"):
        read_documents(str(tmp_path / "a.parquet"))


def test_lines_end_where_json_says(tmp_path):
    """U+2028 and U+0085 may stand unescaped in a JSON text; they end no line of a jsonl file."""
    texts = ["a\u2028b", "c\x85d", "e"]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8-sig")
    assert read_documents(str(path)) == texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none.txt", "text file none.txt does not exist"),
        ("", "the name of the text is empty"),
        ([], "the given list holds no text"),
        (["", "  "], "the given list holds no text"),
        ([5], "the given list, row 0: expected text, got int"),
        ("python-docs:heldout", 'no part "heldout"; did you mean "held-out"'),
    ],
)
def test_texts_that_are_not_there(text, words):
    with pytest.raises(InvalidInput, match=words):
        read_documents(text)


def test_names_that_no_file_can_have(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: (_ for _ in ()).throw(OSError("no such data set")))
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InvalidInput, match=r"no text file and no data set .* can be read: no such data set"):
            read_documents(name)
    with pytest.raises(InvalidInput, match=r"token file xxx.* does not exist"):
        read_tokens("x" * 5000, dimensions=1)


def test_a_chat_template_that_refuses():
    class Tokenizer:
        chat_template = "x"

        def apply_chat_template(self, messages, tokenize):
            raise TypeError(f"{messages[0]} is no message")

    with pytest.raises(InvalidInput, match="row 0: the chat template refuses its messages: 5 is no message"):
        read_documents([[5]], chat_tokenizer=Tokenizer())
    with pytest.raises(InvalidInput, match='"text" is not a list of messages'):
        read_documents(["hello"], chat_tokenizer=Tokenizer())


def test_text_for_a_model_without_a_tokenizer(recipe, refused, tmp_path):
    (tmp_path / "a.txt").write_text("Some text. " * 100)
    words = "the model has no tokenizer: give token ids as `calibration: {tokens: FILE.npy}`"
    refused(recipe(calibration={"text": str(tmp_path / "a.txt")}), InvalidInput, words)


def test_text_shorter_than_a_window(recipe, refused, stories_model):
    short = recipe(calibration={"text": ["Once upon a time."], "samples": 2, "length": 64}, model=str(stories_model))
    refused(short, InvalidInput, r"no document is longer than one window of 64 tokens .*take a smaller `length`$")
    several = {"text": ["Once upon a time."] * 9, "samples": 2, "length": 64}
    refused({**short, "calibration": several}, InvalidInput, "or set `documents: joined`")
    measured = {**short, "calibration": {**several, "documents": "joined"}}
    measured["measure"] = {"perplexity": [{"text": ["Once upon a time."]}], "speed": None}
    refused(measured, InvalidInput, r"the text has \d+ tokens, less than one window of 256: use a smaller window")
