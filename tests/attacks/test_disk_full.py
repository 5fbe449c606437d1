"""A disk that is full at any moment: one error, no half-written file, and the run goes on where it stopped."""

import errno
import os
import resource

import pytest

import sparity
from interruptions import contents
from sparity.checkpoints import shards
from sparity.errors import SparityError
from sparity.files import write_atomically, write_text


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def solving(recipe):
    return recipe({"solver": "sparsegpt"})


def temporary_files(folder):
    return [path for path in folder.rglob(".*") if path.name != ".sparity"]


@pytest.fixture
def full_at(monkeypatch):
    """A function after which the `count`-th file that is written finds the disk full."""

    def arm(patch, count, by):
        left = [count]

        def full():
            left[0] -= 1
            return left[0] == 0

        if by == "fsync":
            flush = os.fsync

            def fsync(descriptor):
                if full():
                    raise OSError(errno.ENOSPC, "No space left on device")
                flush(descriptor)

            patch.setattr("sparity.files.os.fsync", fsync)
        else:
            save = shards._write

            def write(file, tensors, metadata, *rest):
                if full():
                    file.write(b"half")
                    raise OSError(errno.ENOSPC, "No space left on device")
                save(file, tensors, metadata, *rest)

            patch.setattr(shards, "_write", write)

    return arm


@pytest.mark.parametrize(
    ("by", "count", "blocks"),
    [
        ("fsync", 1, 0),  # the manifest
        ("fsync", 4, 0),  # the first shard's folder
        ("fsync", 9, 0),  # the first block's progress
        ("fsync", 15, 1),
        ("fsync", 24, 3),  # the files beside the shards
        ("fsync", 30, 3),
        ("shards", 1, 0),
        ("shards", 2, 0),
        ("shards", 4, 2),
    ],
)
def test_a_full_disk(solving, tmp_path, monkeypatch, full_at, whole, by, count, blocks):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_at(patch, count, by)
        with pytest.raises(
            SparityError, match=r"the disk is full: .* could not be written \([0-9.]+ MB free in .*--resume"
        ):
            sparity.run(solving, output=output)
    assert not output.exists()
    working = output.with_name("out.partial")
    assert temporary_files(working) == []
    finished = {path.name for path in working.glob("model-*")}
    assert len(finished) >= blocks + (blocks > 0)
    resumed = sparity.run(solving, output=output, resume=True)
    assert weights(resumed.path) == whole


@pytest.fixture(scope="module")
def whole(tiny_llama_folder, token_files):
    """The weights of the run that nothing disturbs."""
    result = sparity.run(
        {
            "model": str(tiny_llama_folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{"prune": {"solver": "sparsegpt"}}],
            "measure": {"speed": None},
        }
    )
    return weights(result.path)


STAGES = (
    {"channels": {"sparsity": 0.25}},
    {"prune": {"score": "wanda", "budget": "owl"}},  # opens a second pass
    {"activations": {"sparsity": 0.3}},
)


def test_a_full_disk_in_the_middle_of_a_pass_or_between_two(recipe, tmp_path, monkeypatch, full_at):
    chosen = {**recipe(), "stages": list(STAGES)}
    expected = contents(sparity.run(chosen, output=tmp_path / "whole").path)
    for count in (3, 8, 14, 19, 24, 28, 33, 40, 47, 55):
        output = tmp_path / f"out-{count}"
        with monkeypatch.context() as patch:
            full_at(patch, count, "fsync")
            with pytest.raises(SparityError, match=r"the disk is full: .* could not be written .*--resume"):
                sparity.run(chosen, output=output)
        assert not output.exists()
        resumed = contents(sparity.run(chosen, output=output, resume=True).path)
        assert {name for name in expected if resumed[name] != expected[name]} <= {
            "README.md", "report.html", "sparity.json"  # which hold times
        }  # fmt: skip


def test_a_real_limit_of_the_system(solving, tmp_path, whole):
    """No file may grow beyond 20 kB, which every shard does: the system itself refuses to write."""
    output = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(
            SparityError, match=r"cannot write .*model-0000[12]-of-00004\.safetensors: .*File too large"
        ):
            sparity.run(solving, output=output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not output.exists()
    assert temporary_files(output.with_name("out.partial")) == []
    assert weights(sparity.run(solving, output=output, resume=True).path) == whole


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(SparityError, match=r"cannot write .*missing/a\.txt: No such file or directory"):
        write_text(tmp_path / "missing" / "a.txt", "new")
    for number, words in ((errno.EDQUOT, "the disk is full"), (errno.EIO, "cannot write .*a.txt: Input/output error")):
        with pytest.raises(SparityError, match=words):
            write_atomically(path, lambda _, number=number: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    assert path.read_text() == "old"
