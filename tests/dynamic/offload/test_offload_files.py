"""Folders of offloaded models: what is refused, and that a failure leaves nothing behind."""

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from offloaded import CALIBRATION, opened

import sparity
from sparity.checkpoints.shards import check_header
from sparity.dynamic.offload.arena import Arena
from sparity.dynamic.offload.bound import _speed, gap_of
from sparity.dynamic.offload.bundle import open_bundle, write_bundle
from sparity.dynamic.offload.loading import load_offloaded
from sparity.dynamic.offload.reading import Counts, Reader, fill
from sparity.dynamic.offload.slots import Load
from sparity.dynamic.offload.writing import offload
from sparity.errors import CorruptFile, InvalidInput, RunConflict, SparityError
from sparity.memory import as_bytes


@pytest.fixture
def done(written, tmp_path):
    """A copy that may be damaged."""
    _, found = written("zoo:relu")
    return shutil.copytree(found.folder, tmp_path / "far")


def test_a_bundle_comes_back(tmp_path):
    parts = [torch.arange(12.0).view(4, 3), -torch.arange(8.0).view(4, 2)]
    trace = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    write_bundle(path := tmp_path / "units", parts, trace, {"model": "m"})
    check_header(path)
    found = open_bundle(path, {"model": "m"}, path.stat().st_size)
    assert found.order.tolist() == [1, 3, 0, 2]  # the most frequent first
    assert found.place_of.tolist() == [2, 0, 3, 1]
    assert found.trace.tolist() == trace.tolist()
    assert found.frequency.tolist() == [0, 1, 0, 0.5]
    assert (found.widths, found.record_bytes, found.offset % 4096) == ((3, 2), 20, 0)
    file = os.open(path, os.O_RDONLY)
    for unit in range(4):
        room = bytearray(20)
        fill(file, [memoryview(room)[:12], memoryview(room)[12:]], found.offset + int(found.place_of[unit]) * 20, path)
        assert torch.frombuffer(room, dtype=torch.float32).tolist() == [
            *parts[0][unit].tolist(),
            *parts[1][unit].tolist(),
        ]
    with pytest.raises(CorruptFile, match="ends at byte"):
        fill(file, [memoryview(bytearray(20))], path.stat().st_size - 7, path)
    os.close(file)


@pytest.mark.parametrize(("gap", "calls", "records"), [(0, 4, 5), (1, 2, 7), (9, 1, 9)])
def test_what_lies_between_is_read_in_passing(tmp_path, gap, calls, records):
    weight = torch.arange(30.0).view(10, 3)
    write_bundle(path := tmp_path / "units", [weight, -weight], None, {})
    bundle, arena, counts = open_bundle(path, {}, path.stat().st_size), Arena(6, (3, 3), torch.float32), Counts()
    arena.parts[0].fill_(-7.0)
    units, slots = np.array([0, 3, 5, 6, 8])[[4, 0, 2, 1, 3]], np.array([1, 5, 2, 4, 0])
    with ThreadPoolExecutor(2) as pool:
        reader = Reader(bundle, pool, 2, counts, gap)
        reader.read(Load(units, slots), arena)
        reader.close()
    assert torch.equal(arena.parts[0][slots], weight[units])
    assert torch.equal(arena.parts[1][slots], -weight[units])
    assert (counts.calls, counts.bytes) == (calls, records * 24)
    assert sorted(set(range(6)) - set(slots.tolist())) == (arena.parts[0][:, 0] == -7).nonzero()[:, 0].tolist()


def test_a_gap_is_worth_what_a_call_costs():
    measured = ((1e9, 1e9), (1e9, 4e8), (1e9, 1e8), (1e9, 1e6), (1e9, 2e9))
    assert [gap_of(speeds) for speeds in measured] == [0, 1, 9, 16, 0]


def test_files_that_are_damaged_are_named(done):
    units, resident = done / "units-00002.safetensors", done / "resident-00001.safetensors"
    for path, damage, words in (
        (units, lambda raw: raw[:-1], "truncated or another file: it has"),
        (units, lambda raw: b"x" * len(raw), "truncated or damaged"),
        (
            units,
            lambda raw: (done / "units-00003.safetensors").read_bytes(),
            "belongs to another model: its block is 3",
        ),
        (units, None, "missing"),
        (resident, lambda raw: raw[:100], "truncated or another file"),
        (resident, lambda raw: (done / "resident-00002.safetensors").read_bytes(), "belongs to another model"),
        (done / "sparity-offload.json", lambda raw: b"{}", "this release reads format 1"),
        (done / "sparity-offload.json", lambda raw: raw.replace(b'"output"', b'"other"'), "makes no sense"),
        (done / "sparity-offload.json", lambda raw: raw.replace(b"units-0", b"../s-0"), "makes no sense"),
        (done / "config.json", lambda raw: raw.replace(b'"ffn_dim": 768', b'"ffn_dim": 384'), "does not fit"),
    ):
        whole = path.read_bytes()
        path.unlink()
        if damage is not None:
            path.write_bytes(damage(whole))
        with pytest.raises(CorruptFile, match=words):
            load_offloaded(done, "1GB")
        path.write_bytes(whole)
    with opened(done, "1GB") as far:
        assert far.dtype == torch.float32


def test_another_models_bundle_is_refused(done, written):
    _, other = written("zoo:relu", "bfloat16")
    manifest = json.loads((done / "sparity-offload.json").read_text())
    shutil.copy(other.folder / "units-00002.safetensors", done)
    manifest["bundles"][2]["bytes"] = (done / "units-00002.safetensors").stat().st_size
    (done / "sparity-offload.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match=r"units-00002\.safetensors belongs to another model: its model is"):
        load_offloaded(done, "1GB")


def test_a_file_that_shrinks_while_it_is_read_is_named(done):
    with opened(done, "15MB", ahead=False) as far:
        os.truncate(done / "units-00004.safetensors", 10_000)
        for _ in range(2):  # what could not be read is not taken for read
            with pytest.raises(CorruptFile, match=r"units-00004\.safetensors ends at byte [\d,]+, within its records"):
                far(torch.arange(20)[None])


def test_memory_that_does_not_suffice_is_said(done):
    with pytest.raises(InvalidInput, match=r"memory 9.0 MB does not suffice .* give 14.4 MB or more"):
        load_offloaded(done, "9MB")
    for wrong in ("much", "1.5XB", -3, True, ""):
        with pytest.raises(InvalidInput, match="a number with B, kB"):
            load_offloaded(done, wrong)
    assert [as_bytes(said) for said in (7, "7", "1.5 kB", "2MiB", "1GB")] == [7, 7, 1500, 2**21, 10**9]
    for options in ({"hot": 1.5}, {"threads": 0}, {"window": 0}):
        with pytest.raises(InvalidInput, match="must lie between 0 and 1"):
            load_offloaded(done, "1GB", **options)


def test_other_loaders_say_how_it_is_opened(done, tmp_path):
    with pytest.raises(InvalidInput, match=r"open it with sparity.load_offloaded"):
        sparity.load(done)
    with pytest.raises(InvalidInput, match=r"holds no sparity-offload.json"):
        load_offloaded(tmp_path, "1GB")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """Whichever file it happens at."""
    calls = []
    replace = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SparityError, match="the disk is full"):
        offload("zoo:relu", tmp_path / "far")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(SparityError, match=r"has 0.0 GB free, and the model takes 0.0 GB"):
        offload("zoo:relu", tmp_path / "far")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "far").mkdir()
    with pytest.raises(RunConflict, match="is there already: choose another output, or --force"):
        offload("zoo:moe", tmp_path / "far")
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(RunConflict, match="another run is writing, or one was interrupted"):
        offload("zoo:moe", tmp_path / "other")
    assert offload("zoo:moe", tmp_path / "other", force=True).tokens == 0
    model = shutil.copytree(sparity.zoo.path("moe"), tmp_path / "model")
    with pytest.raises(InvalidInput, match="the model itself lies there"):
        offload(model, model, force=True)
    assert not (tmp_path / "model.partial").exists()


def test_models_without_zeros_are_told_what_to_do(tmp_path, tiny_gpt2_folder):
    with pytest.raises(InvalidInput, match="nothing in this model says which neurons count"):
        offload("zoo:llama", tmp_path / "far")
    with pytest.raises(InvalidInput, match="stored transposed"):
        offload(tiny_gpt2_folder, tmp_path / "far")
    for ids in (torch.zeros(3), torch.zeros(2, 8), torch.zeros(2, 4, dtype=torch.long)):
        with pytest.raises(InvalidInput, match="calibration ids must be"):
            offload("zoo:relu", tmp_path / "far", tokens=ids)
    assert list(tmp_path.iterdir()) == []


def test_without_calibration_text_every_unit_is_alike(tmp_path):
    done = offload("zoo:moe", tmp_path / "far")
    with opened(done.folder, done.least_bytes + done.far_bytes // 2) as far:
        bound = far.sparity_offload.bound
        assert (bound.tokens, bound.asked_bytes) == (0, done.far_bytes)
        assert "with all units needed" in bound.words
        assert sum(map(len, far.sparity_offload.layout.hot)) == 0
        logits = far(CALIBRATION[:1]).logits
    assert torch.equal(logits.argmax(-1), sparity.load("zoo:moe")(CALIBRATION[:1]).logits.argmax(-1))


def test_the_disk_is_measured(done):
    manifest = json.loads((done / "sparity-offload.json").read_text())
    said = {key: manifest["bundles"][0][key] for key in ("model", "block", "number")}
    bundle = open_bundle(done / "units-00000.safetensors", said, manifest["bundles"][0]["bytes"])
    with ThreadPoolExecutor(2) as pool:
        for records in (1, 100):
            assert _speed([bundle], pool, 2, records) > 0
