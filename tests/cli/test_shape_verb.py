"""`sparity shape`: a shape within limits, and the recipe that cuts to it."""

import yaml


def test_it_prints_the_front_and_writes_a_recipe(sparity, model, token_files, tmp_path):
    text = ("--text", token_files["calibration"], "--multiple-of", 8, "--dtype", "float32")
    asked = ("shape", model, "--at-most", "55kB", "--dimension", "depth", "--dimension", "mlp_channels", *text)
    done = sparity(*asked, "-o", tmp_path / "shape.yaml")
    assert done.code == 0
    assert "at most 55.0 kB" in done.out
    assert done.out.count("the answer") == 1
    assert "shapes keep the limits" in done.out
    found = sparity(*asked, "--json").json
    sizes = found["answer"]["sizes"]
    assert f"chosen: depth {sizes['depth']}, mlp_channels {sizes['mlp_channels']}: " in done.out
    assert yaml.safe_load((tmp_path / "shape.yaml").read_text()) == found["recipe"]
    planned = sparity("plan", tmp_path / "shape.yaml", "--json").json
    assert planned["output_bytes"] == found["answer"]["bytes"]
    again = sparity(*asked, "-o", tmp_path / "shape.yaml")
    assert (again.code, "exists already: pass --force" in again.err) == (1, True)
    assert sparity(*asked, "-o", tmp_path / "shape.yaml", "--force", "--quiet").out == ""


def test_what_cannot_be_is_one_line(sparity, model):
    for options, words in (
        ((), "a limit is missing"),
        (("--at-least", "fast"), '--at-least fast: write it as "1.5x" (of dense) or as "40 tokens/s"'),
        (("--at-most", "1kB", "--method", "magnitude"), "no shape keeps at most 1.0 kB: the closest is depth 1"),
        (("--at-most", "1MB", "--method", "shortgpt"), "shortgpt does not rank the parts of one dimension"),
    ):
        done = sparity("shape", model, "--dtype", "float32", *options)
        assert done.code == 1
        assert words in done.err
        assert len(done.err.strip().splitlines()) <= 3
