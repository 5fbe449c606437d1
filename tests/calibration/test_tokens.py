import random

import numpy as np
import pytest
import torch

from sparity.calibration.tokens import Windows, draw_windows, read_tokens, token_hash
from sparity.errors import CorruptFile, InvalidInput


class Letters:
    """A tokenizer of one token per letter, behind a 1 at the start."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, *map(ord, text)]}


def reference(documents, samples, length, seed):
    """The loop of SparseGPT's and Wanda's `get_c4`."""
    random.seed(seed)
    chosen = []
    for _ in range(samples):
        while True:
            ids = Letters()(documents[random.randint(0, len(documents) - 1)])["input_ids"]
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        chosen.append(ids[start : start + length])
    return chosen


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_windows_are_those_of_the_reference_code(seed):
    documents = ["abc", "abcdefghijklmnop", "x" * 40, "q", "the quick brown fox jumps over the lazy dog"]
    drawn = draw_windows(documents, Letters(), Windows(20, 12, seed))
    assert drawn.tolist() == reference(documents, 20, 12, seed)


def test_joined_documents_are_one():
    drawn = draw_windows(["ab", "cd"], Letters(), Windows(50, 5, 0, "joined"))
    assert {tuple(row) for row in drawn.tolist()} <= {(1, 97, 98, 10, 10), (97, 98, 10, 10, 99)}


def test_no_document_is_long_enough_and_the_error_says_what_to_do():
    with pytest.raises(InvalidInput, match=r"longer than one window of 5 tokens .* the longest: 4 tokens.*joined"):
        draw_windows(["abc", "ab", "abc"], Letters(), Windows(3, 5))
    with pytest.raises(InvalidInput) as caught:
        draw_windows(["abc"], Letters(), Windows(3, 50))
    assert "joined" not in str(caught.value)  # joining would not help


def test_token_files(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert read_tokens(path, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InvalidInput, match=r"expected token ids of shape \[length\], got \[2, 3\]"):
        read_tokens(path, 1)
    np.save(path, np.ones((2, 2)))
    with pytest.raises(InvalidInput, match="integers, got float64"):
        read_tokens(path, 2)
    path.write_bytes(b"nothing")
    with pytest.raises(CorruptFile, match="not a numpy array"):
        read_tokens(path, 2)


def test_hash_depends_on_ids_and_shape():
    ids = torch.arange(6)
    assert token_hash(ids) == token_hash(torch.arange(6))
    assert token_hash(ids) != token_hash(ids.reshape(2, 3))
    assert token_hash(ids) != token_hash(ids.flip(0))
