"""`sparity bench`: real models in a small setting, with their memory measured in processes of their own."""

import json

import pytest

from pages import Page

SMALL = ("--prompt", 8, "--tokens", 2, "--rounds", 1, "--batch", "2,1", "--threads", 1)


def test_bench(sparity, tmp_path):
    done = sparity("bench", "zoo:llama", "--against", "transformers", *SMALL, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    report = done.json
    assert report == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(timing["name"], timing["batch"]) for timing in report["timings"]] == [
        ("transformers", 1),
        ("zoo:llama", 1),
        ("transformers", 2),
        ("zoo:llama", 2),
    ]
    assert [ratio["against"] for ratio in report["ratios"]] == ["transformers"] * 2
    for timing in report["timings"]:
        assert timing["peak_memory"] > report["runners"][0]["weight_bytes"] > 5_000_000
        assert timing["pace"]["decode"]["median"] > 0
    assert "zoo:llama" in Page((tmp_path / "out" / "bench.html").read_text()).text
    again = sparity("bench", "zoo:llama", *SMALL, "-o", tmp_path / "out")
    assert again.code == 1
    assert again.err.startswith(f"error: {tmp_path / 'out'} holds a benchmark already")


def test_what_is_refused(sparity):
    def refusal(*arguments):
        done = sparity("bench", *arguments)
        assert done.code == 1
        return done.err.strip()

    assert refusal("zoo:llama", "--batch", "1,x") == "error: --batch 1,x: write whole numbers from 1, such as 1,8,32"
    assert refusal("zoo:llama", "--batch", "0").startswith("error: --batch 0")
    assert refusal("zoo:llama", "--batch", "9" * 5000).startswith("error: --batch 99")
    assert refusal("zoo:llama", "--batch", "\u0663").startswith("error: --batch")
    assert refusal("zoo:llama", "--prompt", 2048).startswith(
        "error: bench, zoo:llama: a prompt of 2048 and 64 new tokens do not fit the model's context of 2048 tokens"
    )
    assert "dense is named twice" in refusal("zoo:llama", "--against", "dense,dense")
    assert "this path does not exist" in refusal("zoo:llama", "--against", "no/such/model")


def test_an_output_that_cannot_be_is_refused_before_anything_is_measured(sparity, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sparity.measure.timing.bench.bench", lambda *_: pytest.fail("something was measured"))
    done = sparity("bench", "zoo:llama", "-o", tmp_path / "file")
    assert done.code == 1
    assert "cannot create the folder" in done.err
    assert (tmp_path / "file").read_text() == "mine"
