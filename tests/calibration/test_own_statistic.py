"""A statistic that another package brings: what names it in `needs` gets it, from a walk or a store."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import sparity
from interruptions import weight_files
from sparity import registry
from sparity.budgets.base import Budget, shift_to_sparsity
from sparity.calibration import Statistics
from sparity.calibration.input_statistics.base import Statistic
from sparity.calibration.store import StatisticsStore, store_bytes
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Block, Decoder
from sparity.static.prune.scores.base import Score


@pytest.fixture
def peak():
    """The largest |x| of each input channel, with a score, and a budget that notes what it was shown."""
    shown = {}

    @sparity.register("statistic", "peak")
    @dataclass(frozen=True)
    class Peak(Statistic):
        def add(self, total, x):
            torch.maximum(total, x.abs().amax(0), out=total)

        def merge(self, total, other):
            return torch.maximum(total, other)

        def value(self, total, sequences, tokens):
            return total

    @sparity.register("prune.score", "by_peak")
    @dataclass(frozen=True)
    class ByPeak(Score):
        needs: ClassVar[tuple[str, ...]] = ("peak",)

        def score(self, weight, statistics):
            return weight.abs().float() * statistics["peak"]

    @sparity.register("budget", "peaks")
    @dataclass(frozen=True)
    class Peaks(Budget):
        needs: ClassVar[tuple[str, ...]] = ("peak", "mean")

        def observe(self, weights, statistics):
            assert weights.keys() == statistics.keys()
            shown.update({name: (found["peak"].clone(), found.mean) for name, found in statistics.items()})
            for found in statistics.values():
                with pytest.raises(InvalidInput, match='"column_norm" was not gathered; declare it in `needs`'):
                    _ = found.column_norm
            return {name: float(found["peak"].max()) for name, found in statistics.items()}

        def allocate(self, sites, target, objective=None):
            highest = max(site.evidence for site in sites)
            return shift_to_sparsity(sites, [-0.1 * site.evidence / highest for site in sites], target)

    yield shown
    for own in (("statistic", "peak"), ("statistic", "other"), ("prune.score", "by_peak"), ("budget", "peaks")):
        registry._registered.pop(own, None)


@pytest.mark.usefixtures("peak")
def test_a_score_of_one_matrix_reads_it():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 1.0]])
    inputs = torch.tensor([[1.0, -5.0, 0.5], [2.0, 0.0, -1.0]])  # peaks 2, 5 and 1: scores 2 10 3, 8 5 1
    pruned, keep = sparity.prune_weight(weight, inputs, score="by_peak", sparsity=0.4)  # 3 and below go
    assert keep.tolist() == [[False, True, False], [True, True, False]]
    assert pruned.tolist() == [[0.0, 2.0, 0.0], [4.0, 1.0, 0.0]]
    with pytest.raises(InvalidInput, match="needs the statistics peak: pass `inputs`"):
        sparity.prune_weight(weight, score="by_peak")


@pytest.mark.usefixtures("peak")
def test_halves_merge_by_its_own_rule():
    halves = [Statistics.gather("here", ["peak"]) for _ in range(2)]
    halves[0].add(torch.tensor([[1.0, -5.0]]))
    halves[1].add(torch.tensor([[-3.0, 2.0]]))
    assert halves[0].merge(halves[1])["peak"].tolist() == [3.0, 5.0]


def recipe(token_files, **prune):
    return {
        "calibration": {"tokens": token_files["calibration"]},
        "stages": [{"prune": {"sparsity": 0.5, **prune}}],
        "measure": {"speed": None},
    }


def test_a_run_reads_it_for_score_and_budget_from_the_walk_and_from_a_store(
    peak, family_models, token_files, tmp_path, monkeypatch
):
    model = family_models["llama"]
    plain = recipe(token_files, score="by_peak", budget="peaks", order="independent")
    expected = sparity.run(plain, model=model, output=tmp_path / "plain")
    seen = dict(peak)
    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.from_numpy(np.load(token_files["calibration"])))
        normed = model.model.layers[0].input_layernorm(embedded).flatten(0, 1)  # [tokens, hidden], what q reads
    name = next(name for name in seen if name.endswith("layers.0.self_attn.q_proj"))
    assert torch.equal(seen[name][0], normed.abs().amax(0))
    torch.testing.assert_close(seen[name][1], normed.mean(0))
    shares = {layer.name: layer.target for layer in expected.report.candidates[0].changes}
    highest = max(float(found.max()) for found, _ in seen.values())
    differences = {name: 0.1 * float(found.max()) / highest for name, (found, _) in seen.items()}
    first = next(iter(shares))
    for name, share in shares.items():
        assert share + differences[name] == pytest.approx(shares[first] + differences[first], abs=1e-9)
    peak.clear()
    stored = {**plain, "calibration": {**plain["calibration"], "store": str(tmp_path / "store")}}
    for output in ("gathered", "read"):
        found = sparity.run(stored, model=model, output=tmp_path / output)
        assert weight_files(found.path) == weight_files(expected.path)
        assert peak.keys() == seen.keys()
        assert all(torch.equal(peak[name][0], seen[name][0]) for name in seen)
        peak.clear()
        monkeypatch.setattr(Block, "run", None)  # the second time a forward pass fails
    assert StatisticsStore.open(tmp_path / "store", identity(tmp_path)).needs == {"peak", "mean", "column_norm"}


def identity(folder):
    return json.loads((folder / "store/statistics.json").read_text())["identity"]


@pytest.mark.usefixtures("peak")
def test_its_bytes_count(family_models):
    decoder = Decoder.open(family_models["llama"], "cpu", "float32")
    sites = [site for index in range(len(decoder)) for site in decoder.sites(index)]
    columns = sum(site.projections[0].weight.shape[1] for site in sites)
    assert store_bytes(decoder, {"peak", "mean", "gradient"}) == 2 * 4 * columns


def test_a_store_says_which_statistic_is_not_installed_any_more(peak, tmp_path):
    statistics = Statistics.gather("here", ["peak"])
    statistics.add(torch.ones(1, 2, 3))
    store = StatisticsStore(tmp_path)
    store.save(0, {"here": statistics})
    store.close({}, ["peak"])
    assert StatisticsStore.open(tmp_path, {}).needs == {"peak"}
    del registry._registered["statistic", "peak"]
    with pytest.raises(CorruptFile, match=r"of a package that is not installed \(no statistic is called 'peak'\)"):
        StatisticsStore.open(tmp_path, {})


def test_sums_of_another_shape_or_type_are_refused(peak, tmp_path):
    block = SimpleNamespace(index=0, module=torch.nn.Linear(1, 1))
    site = SimpleNamespace(name="here", projections=(SimpleNamespace(weight=torch.zeros(2, 3)),))
    for number, total in enumerate((torch.ones(4), torch.ones(1, 3), torch.ones(3, dtype=torch.int64))):
        folder = tmp_path / str(number)
        folder.mkdir()
        statistics = Statistics("here", frozenset(["peak"]), 1, 2, {"peak": total})
        store = StatisticsStore(folder)
        store.save(0, {"here": statistics})
        store.close({}, ["peak"])
        with pytest.raises(CorruptFile, match="the sums of here do not fit it"):
            StatisticsStore.open(folder, {}).read(block, site)


@pytest.mark.parametrize("name", ["tokens", "sum"])
def test_one_that_would_be_stored_over_another_is_refused(peak, name, tmp_path):
    class Other(registry.get("statistic", "peak")):
        stored_as: ClassVar[str] = name

    sparity.register("statistic", "other")(Other)
    statistics = Statistics.gather("here", ["other", "mean"])
    statistics.add(torch.ones(1, 2, 3))
    with pytest.raises(InvalidInput, match=f'two statistics are stored as "{name}.here"'):
        StatisticsStore(tmp_path).save(0, {"here": statistics})
