"""`sparity convert`: what it says, and what it refuses."""

import pytest

from orphaned_folders import orphan
from sparity.pipeline.run.run_folder import RunFolder


@pytest.fixture
def plain(sparity, model, token_files, tmp_path):
    tokens = token_files["calibration"], token_files["text"]
    done = sparity(
        "prune", model, "--text", tokens[0], "--measure", tokens[1], "--window", 16, "--no-speed", "--quiet", "--dtype",
        "bfloat16", "-o", tmp_path / "plain",
    )  # fmt: skip
    assert done.code == 0
    return tmp_path / "plain"


def test_there_and_back(sparity, plain, tmp_path):
    done = sparity("convert", plain, tmp_path / "packed")
    assert done.code == 0
    assert done.out.startswith(f"{tmp_path / 'packed'}: packed, weights ")
    back = sparity("convert", tmp_path / "packed", tmp_path / "back", "--json").json
    assert back["layout"] == "plain"
    assert back["bytes_after"] > 0
    assert back["bytes_before"] > 0
    assert sparity("verify", tmp_path / "packed").code == 0
    assert sparity("verify", tmp_path / "back").code == 0


def test_huffman_codes_are_smaller_and_verify_says_in_how_many_bytes(sparity, plain, tmp_path):
    sizes = {
        coding: sparity("convert", plain, tmp_path / coding, "--values", "int8", "--coding", coding, "--json").json
        for coding in ("none", "huffman")
    }
    assert sizes["huffman"]["bytes_after"] < sizes["none"]["bytes_after"]
    done = sparity("verify", tmp_path / "huffman")
    assert done.code == 0
    found = sparity("verify", tmp_path / "huffman", "--json").json
    assert found["bytes"] == sizes["huffman"]["bytes_after"]
    assert found["coded"]["stored"] < found["bytes"]
    layouts = sum(found["coded"]["layouts"].values())
    assert f" files unchanged, weights {found['bytes'] / 1000:.1f} kB ({layouts} matrices Huffman-coded" in done.out


def test_an_orphaned_layout_becomes_either(sparity, model, tmp_path):
    old = orphan(model, tmp_path / "old", "sparse-bitmask")
    assert sparity("convert", old, tmp_path / "packed").out.startswith(f"{tmp_path / 'packed'}: packed, weights ")
    assert sparity("convert", old, tmp_path / "plain", "--to", "plain", "--json").json["layout"] == "plain"


def test_what_is_refused(sparity, plain, tmp_path):
    for arguments, words in (
        (
            (plain, tmp_path / "out", "--values", "int5"),
            '--values int5: no encoding "int5"; did you mean "int8"? `sparity methods encoding` lists them all',
        ),
        ((plain, tmp_path / "out", "--coding", "zip"), "--coding zip: none or huffman"),
        ((plain, tmp_path / "out", "--to", "zip"), "--to zip: packed, plain, gguf or auto"),
        ((tmp_path / "nowhere", tmp_path / "out"), "does not exist"),
        ((plain, plain), "the dense model lies there and would be lost"),
    ):
        done = sparity("convert", *arguments)
        assert done.code == 1
        assert words in done.err
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_was_stopped_after_its_result_is_finished(sparity, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_remove_state", lambda self: None)  # as if the process had ended here
        assert sparity("convert", model, tmp_path / "out").code == 0
    assert (tmp_path / "out" / ".sparity").is_dir()
    done = sparity("convert", model, tmp_path / "out")
    assert done.code == 0
    assert done.out.startswith(f"{tmp_path / 'out'}: packed, weights ")
    assert not (tmp_path / "out" / ".sparity").exists()
    assert sparity("convert", model, tmp_path / "out").code == 1


def test_a_run_that_was_stopped_after_its_result_is_finished(sparity, recipe_file, tmp_path, monkeypatch):
    arguments = ("run", recipe_file(), "-o", tmp_path / "out", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_remove_state", lambda self: None)
        first = sparity(*arguments)
    done = sparity(*arguments, "--resume")
    assert done.code == 0
    assert done.json == first.json
    assert not (tmp_path / "out" / ".sparity").exists()
