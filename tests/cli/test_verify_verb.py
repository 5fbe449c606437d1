"""`sparity verify` finds every change to a finished folder, also where the record of hashes was adapted to it."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

NAME = "model.layers.1.mlp.up_proj"
SHARD = "model-00003-of-00004.safetensors"


@pytest.fixture(scope="module")
def finished(sparity, model, token_files, tmp_path_factory):
    """A model pruned to 2:4, one block of it left dense."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = {
        "model": str(model),
        "stages": [{"prune": {"score": "magnitude", "pattern": "2:4", "dense": ["model.layers.0.*"]}}],
        "measure": {"speed": None},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert sparity("run", folder / "recipe.yaml", "-o", folder / "out").code == 0
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def edit_weight(folder, change):
    """Change a matrix, and the record of its file's hash with it."""
    tensors = load_file(folder / SHARD)
    change(tensors[f"{NAME}.weight"])
    save_file(tensors, folder / SHARD, {"format": "pt"})
    digest = hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()
    edit_record(folder, lambda record: record["files"].update({SHARD: digest}))


def edit_record(folder, change):
    path = folder / "sparity.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_stage(path, **entries):
    edit_record(path.parent, lambda record: record["stages"][0].update(entries))


def problems(sparity, folder):
    done = sparity("verify", folder)
    assert done.out == ""
    assert done.code == 1
    told = sparity("verify", folder, "--json")
    assert told.code == 1
    assert told.json["problems"] == done.err.splitlines()
    return done.err.splitlines()


def test_a_finished_folder(sparity, finished):
    done = sparity("verify", finished)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{finished}: ")
    assert done.out.endswith("21 projections, magnitude, 2 of 4 kept, realised sparsity 33.3333%\n")
    found = sparity("verify", finished, "--json").json
    assert (found["problems"], found["stages"]) == ([], ["magnitude, 2 of 4 kept"])
    assert {projection["zeros"] for projection in found["projections"]} == {0.0, 0.5}


@pytest.mark.parametrize("place", [-1, -5000])
def test_one_flipped_bit_in_a_shard(sparity, out, place):
    content = bytearray((out / SHARD).read_bytes())
    content[place] ^= 1
    (out / SHARD).write_bytes(content)
    assert f"{SHARD}: changed since it was written (hash differs)" in problems(sparity, out)


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors.index.json"])
def test_one_byte_more_in_another_file(sparity, out, name):
    (out / name).write_text((out / name).read_text() + " ")
    assert problems(sparity, out) == [f"{name}: changed since it was written (hash differs)"]


def test_a_zero_less_with_a_fixed_hash(sparity, out):
    def unzero(weight):
        zero = int((weight == 0).flatten().nonzero()[0])
        weight.view(-1)[zero] = 1e-30

    edit_weight(out, unzero)
    assert problems(sparity, out) == [
        f"{NAME}: sparsity {1023 / 2048:.6f}, recorded 0.500000",
        f"{NAME}: 1 groups break the pattern (2 of 4 kept)",
    ]


def test_as_many_zeros_in_the_wrong_places(sparity, out):
    """Only the check of the pattern sees it: hash and sparsity agree with the record."""

    def move(weight):
        first, second = weight.view(-1)[:4], weight.view(-1)[4:8]
        first[(first == 0).nonzero()[0]] = 1.0
        second[(second != 0).nonzero()[0]] = 0.0

    edit_weight(out, move)
    assert problems(sparity, out) == [f"{NAME}: 1 groups break the pattern (2 of 4 kept)"]


def test_minus_zero_counts_as_zero(sparity, out):
    edit_weight(out, lambda weight: weight.copy_(torch.where(weight == 0, -0.0, weight)))
    assert sparity("verify", out).code == 0


def test_files_that_vanish_or_appear(sparity, out):
    (out / "README.md").unlink()
    shutil.copy(out / SHARD, out / "more.safetensors")
    assert problems(sparity, out) == ["README.md: missing", "more.safetensors: weights that are not in the record"]


def test_a_file_that_takes_the_place_of_the_weights(sparity, out):
    shutil.copy(out / SHARD, out / "model.safetensors")  # which transformers would load, and no shard
    done = sparity("verify", out)
    assert done.code == 1
    assert done.err.endswith("another configuration (model.safetensors: weights that are not in the record)\n")


def test_a_shard_that_vanishes(sparity, out):
    (out / SHARD).unlink()
    done = sparity("verify", out)
    assert (done.code, done.err) == (1, f"error: {out}: missing shards {SHARD}; fetch them again\n")


def test_a_record_that_points_elsewhere(sparity, out):
    edit_record(out, lambda record: record["files"].update({"../../etc/passwd": "0", "..": "0"}))
    assert problems(sparity, out) == ["../../etc/passwd: not a file of this folder", "..: not a file of this folder"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text("{"), "is not JSON"),
        (lambda path: path.write_text("[]"), r"must hold a JSON object, not a list"),
        (lambda path: path.unlink(), "has no sparity.json: it was not written by Sparity, or its run is unfinished"),
        (lambda path: edit_record(path.parent, lambda record: record.update(format=99)), "has format 99; this release"),
        (lambda path: edit_record(path.parent, lambda record: record.update(files=["a"])), 'no usable "files" in it'),
        (lambda path: edit_record(path.parent, lambda record: record.update(projections={"a": ""})), 'no usable "proj'),
        (lambda path: edit_record(path.parent, lambda record: record.pop("stages")), 'no usable "stages" in it'),
        (lambda path: edit_stage(path, name="prnue"), '(stage 0: no stage "prnue"; did you mean "prune"?'),
        (lambda path: edit_stage(path, options={"pattern": 5}), "(stage 0: its options make no sense)"),
        (lambda path: edit_stage(path, options={"pattern": "x:y"}), 'no pattern "x:y"'),
        (lambda path: edit_stage(path, decision=7), "(stage 0: its options make no sense)"),
        (lambda path: edit_stage(path, decision={}), "is damaged (what prune decided)"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read(sparity, out, change, words):
    change(out / "sparity.json")
    done = sparity("verify", out)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert words in done.err
