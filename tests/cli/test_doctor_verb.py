"""`sparity doctor --kernels`: what it shows of a packed and of a plain model, and what it refuses."""

import pytest

import sparity as package
from sparity.engine.kernels import native
from sparity.pipeline.run.packing import convert

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")


@pytest.fixture
def plain(model, tmp_path):
    recipe = {"dtype": "bfloat16", "stages": [{"prune": {"score": "magnitude"}}], "measure": {"speed": None}}
    return package.run(recipe, model=str(model), output=tmp_path / "plain", device="cpu").path


@NATIVE
def test_a_packed_model(sparity, plain, tmp_path):
    convert(plain, tmp_path / "packed")
    found = sparity("doctor", "--kernels", tmp_path / "packed", "--json").json
    assert (found["layout"], found["threads"], found["unavailable"]) == ("packed", 1, None)
    assert sum(alike["count"] for alike in found["weights"]) == 21
    square = next(alike for alike in found["weights"] if "q_proj" in alike["roles"])
    assert (square["rows"], square["columns"], square["format"], square["values"]) == (32, 32, "bitmask", "bfloat16")
    assert square["density"] == 50
    assert square["formats"] is None
    assert list(square["kernels"]) == ["1", "4", "16", "128"]
    assert [choice["winner"] for choice in square["kernels"].values()] == ["gemv", "gemv", "gemv", "prefill"]
    few = square["kernels"]["4"]
    assert few["how"] == "not timed: SPARITY_CHOICE=rules"
    assert few["candidates"] == [
        {"name": "gemv", "seconds": None, "lost": None},
        {"name": "prefill", "seconds": None, "lost": "not the rule's"},
        {"name": "pytorch", "seconds": None, "lost": "unpacks the weight for each call"},
    ]
    shown = " ".join(sparity("doctor", "--kernels", tmp_path / "packed").out.split())
    assert "SPARITY_CHOICE=rules" in shown
    assert "bitmask" in shown
    assert found["decoding"] == "heads of size 8; a multiple of 16 up to 512 is needed"
    assert f"decodes by transformers' own code: {found['decoding']}" in shown


@NATIVE
def test_a_model_on_the_fast_path(sparity):
    assert sparity("doctor", "--kernels", "zoo:llama", "--json").json["decoding"] is None
    assert "decodes on the engine's fast path" in sparity("doctor", "--kernels", "zoo:llama").out


@NATIVE
def test_a_plain_model_shows_what_would_be_packed_for_speed(sparity, plain):
    found = sparity("doctor", "--kernels", plain, "--json").json
    assert found["layout"] == "plain"
    square = next(alike for alike in found["weights"] if "q_proj" in alike["roles"])
    assert square["formats"]["winner"] == square["format"] == "bitmask"
    lost = {candidate["name"]: candidate["lost"] for candidate in square["formats"]["candidates"]}
    assert lost["two_of_four"] == "cannot hold this mask"


def test_a_dense_model_in_float32_runs_in_pytorch(sparity, model):
    found = sparity("doctor", "--kernels", model, "--json").json
    assert {alike["format"] for alike in found["weights"]} == {"dense"}
    assert {choice["winner"] for alike in found["weights"] for choice in alike["kernels"].values()} == {"pytorch"}
    assert found["decoding"] == "the engine runs models in bfloat16, not float32"


def test_without_compiled_kernels_it_says_why(sparity, model, monkeypatch):
    monkeypatch.setattr("sparity.engine.kernels.native._load", lambda: "for this test")
    native.unavailable.cache_clear()
    try:
        done = sparity("doctor", "--kernels", model)
    finally:
        native.unavailable.cache_clear()
    assert done.code == 0
    assert "no compiled kernels: for this test" in done.out


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_what_is_no_model(sparity, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    done = sparity("doctor", "--kernels", tmp_path / folder)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert str(tmp_path / folder) in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""
