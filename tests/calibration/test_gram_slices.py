"""Gram matrices in files: the same bits as in memory, and no more of them in memory than was asked for."""

from pathlib import Path

import pytest
import torch

from sparity.calibration import Statistics, gram_slices, inverse_factor, statistics, walk
from sparity.calibration.evidence import LiveIndependent, LiveSequential
from sparity.calibration.gram_slices import GramFiles, slices
from sparity.calibration.input_statistics import gram
from sparity.calibration.mapped import release, scratch_tensor
from sparity.errors import NumericalError
from sparity.models import Decoder

TOKENS = torch.arange(6 * 20).reshape(6, 20) % 97


@pytest.fixture
def narrow(monkeypatch):
    """Panels of a few columns, so that tiny models have several."""
    for module in (gram_slices, statistics, inverse_factor, gram):
        monkeypatch.setattr(module, "PANEL", 12)
    monkeypatch.setattr(inverse_factor, "WHOLE", 12)


@pytest.mark.parametrize("source", [LiveSequential, LiveIndependent])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sums_in_slices_are_the_same_bits(family_models, tmp_path, narrow, family, source):
    decoder = Decoder.open(family_models[family])

    def gathered(files):
        found = {}
        inputs = decoder.inputs(TOKENS, 2)
        room = [torch.empty_like(inputs.hidden), torch.empty_like(inputs.hidden)]
        for visit in walk(decoder, inputs, room=lambda blocks: room[blocks % 2], files=files):
            for site, known in source(frozenset({"gram", "mean"})).for_block(visit).sites():
                sums = [known.gram, known["mean"], *known.inverse_factor()] if known.tokens else []
                found[site.name] = [known.tokens, known.sequences, *(each.clone() for each in sums)]
        return found

    expected, found = gathered(None), gathered(GramFiles(tmp_path, most=12 * 12 * 40))
    assert expected.keys() == found.keys()
    for name, (tokens, sequences, *sums) in expected.items():
        assert found[name][:2] == [tokens, sequences]
        assert all(torch.equal(one, other) for one, other in zip(sums, found[name][2:], strict=True)), name
    assert not list(tmp_path.iterdir())


def test_a_slice_is_what_fits():
    panels = [12 * 1024 * width for width in (3072, 2048, 1024)]
    assert slices([3072], panels[0]) == [[(0, 0)], [(0, 1024), (0, 2048)]]
    assert slices([3072], 1) == [[(0, 0)], [(0, 1024)], [(0, 2048)]]
    assert slices([3072, 100], sum(panels) + 12 * 100 * 100) == [[(0, 0), (0, 1024), (0, 2048), (1, 0)]]


def test_inputs_that_are_not_finite_are_refused(family_models, tmp_path):
    decoder = Decoder.open(family_models["llama"])
    inputs = decoder.inputs(TOKENS, 2)
    inputs.hidden[0, 0, 0] = float("nan")
    for visit in walk(decoder, inputs, files=GramFiles(tmp_path, most=1 << 20)):
        with pytest.raises(NumericalError, match="NaN or infinite"):
            list(visit.gather(visit.block.sites, frozenset({"gram"})))
        break


@pytest.mark.parametrize("size", [13, 24, 61])
def test_a_factor_by_panels_is_that_of_the_whole(tmp_path, narrow, size):
    x = torch.randn(200, size, generator=torch.Generator().manual_seed(size))
    matrix = x.T @ x / 100 + 0.01 * torch.eye(size)
    in_file = scratch_tensor(tmp_path, (size, size), torch.float32)
    upper = torch.block_diag(*[torch.ones(min(12, size - start), 12) for start in range(0, size, 12)])[:, :size]
    in_file.copy_(matrix * (upper.cumsum(1) > 0))  # as summed: the upper panels
    found, same = (inverse_factor.factor_of_inverse(each) for each in (in_file.clone(), in_file))
    assert torch.equal(found, same)
    assert same is in_file
    assert torch.equal(found, found.triu())
    torch.testing.assert_close(found.T @ found, torch.linalg.inv(matrix), rtol=1e-4, atol=1e-4)


def test_what_has_no_factor_gives_none_by_panels_too(narrow):
    indefinite = torch.eye(30)
    indefinite[3, 3] = -1.0
    assert inverse_factor.factor_of_inverse(indefinite) is None


def test_a_singular_gram_matrix_is_damped_more_in_a_file_too(tmp_path, narrow):
    x = torch.ones(1, 4, 30)
    factors = []
    for room in (None, GramFiles(tmp_path, 0).matrix):
        known = Statistics.gather("here", ("gram",))
        known.add(x)
        known.room = room
        factors.append(known.inverse_factor(0.0)[0])
    assert torch.equal(*factors)


def test_a_scratch_tensor_is_a_file_that_keeps_what_was_released(tmp_path):
    kept = scratch_tensor(tmp_path, (600, 1000), torch.float32)
    assert not kept.any()
    assert not list(tmp_path.iterdir())
    kept[:] = torch.arange(600.0)[:, None]
    before = _file_pages()
    release(kept)
    assert before - _file_pages() > 2_000_000  # of 2.4 MB
    assert kept[:, 7].tolist() == list(range(600))
    ordinary = torch.ones(1000, 1000)
    release(ordinary)
    assert bool(ordinary.all())


def _file_pages() -> int:
    """Bytes of files that are in this process's memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024
