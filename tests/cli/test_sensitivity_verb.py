"""`sparity sensitivity`: what it prints where, and what it leaves on disk."""

import json

import numpy as np
import pytest


@pytest.fixture
def arguments(model, token_files, tmp_path):
    tokens = token_files["calibration"], token_files["text"]
    sizes = ("--window", 16, "--windows", 2, "--batch", 4)
    return ("sensitivity", model, "--text", tokens[0], "--measure", tokens[1], *sizes, "-o", tmp_path / "out")


def test_it_shows_halves_and_the_costliest_layers(sparity, arguments, tmp_path):
    done = sparity(*arguments, "--ratio", 0.5, "--ratio", 0.9)
    assert done.code == 0
    assert "Every part made sparse alone by wanda, to 50.0 % and 90.0 %" in done.out
    assert "attention of all blocks" in done.out
    assert "mlp of all blocks" in done.out
    assert done.out.count("block 0,") + done.out.count("block 1,") + done.out.count("block 2,") == 5
    assert f"page: {tmp_path / 'out' / 'sensitivity.html'}" in done.out
    assert "measuring what sparsity costs ..." in done.err
    again = sparity(*arguments)
    assert again.code == 1
    assert "exists already" in again.err


def test_json_is_the_file(sparity, arguments, tmp_path):
    done = sparity(*arguments, "--solver", "sparsegpt", "--pattern", "2:4", "--json")
    assert done.json == json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert done.json["ratios"] == [0.5]
    assert done.json["method"] == "sparsegpt"
    assert done.err == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--ratio", 1.5), "give at least one, each between 0 and 1"),
        (("--measure", "nowhere.npy"), "token file nowhere.npy does not exist"),
        (("--windows", 0), "measure.windows: Input should be greater than or equal to 1"),
        (("--score", "wnda"), 'did you mean "wanda"'),
        (("--unseen-expert", "nonsense"), "unseen_expert: Input should be 'error', 'magnitude' or 'dense'"),
    ],
)
def test_bad_input_is_one_line(sparity, arguments, tmp_path, change, words):
    done = sparity(*arguments, *change)
    assert done.code == 1
    assert words in done.err
    assert len(done.err.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_too_little_text(sparity, arguments, tmp_path):
    np.save(tmp_path / "short.npy", np.arange(5))
    done = sparity(*arguments, "--measure", tmp_path / "short.npy")
    assert done.code == 1
    assert "less than one window of 16" in done.err
