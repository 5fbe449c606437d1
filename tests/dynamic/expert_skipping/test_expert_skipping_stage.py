"""The stage `expert_skipping`: calibrated, saved with the model, loaded and attached again, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from offloaded import opened
from safetensors.torch import load_file

import sparity
from families import build, tiny_configs
from sparity.dynamic.expert_skipping.skipping import experts_of_sites, skip_of, skipping
from sparity.dynamic.expert_skipping.stage import ExpertSkipping
from sparity.dynamic.offload.folder import open_bundles, read_manifest
from sparity.dynamic.offload.writing import offload
from sparity.engine.attach import attached
from sparity.engine.modules.experts import PackedExperts
from sparity.errors import CorruptFile, InvalidInput
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.recipe import Recipe

FILE = "sparity-dynamic/00-expert_skipping.safetensors"
IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(2))
FAR_IDS = torch.arange(24)[None] * 101 % 8192


def recipe(folder, *stages, **sections):
    np.save(tokens := folder / "tokens.npy", IDS.numpy())
    return {
        "calibration": {"tokens": str(tokens)},
        "stages": list(stages),
        "measure": {"perplexity": [], "speed": None},
        **sections,
    }


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def apart(one, other):
    """The mean difference of logits."""
    return float((one.float() - other.float()).abs().mean())


@pytest.fixture(scope="module")
def saved(family_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipping")
    asked = recipe(folder, {"expert_skipping": {}})
    return sparity.run(asked, model=family_models["mixtral"], output=folder / "out", device="cpu").path


def thresholds_of(folder):
    return {name.removesuffix(".threshold"): float(found) for name, found in load_file(folder / FILE).items()}


def test_what_was_saved_computes_as_the_context_does(saved, family_models):
    model, loaded = family_models["mixtral"], sparity.load(saved)
    experts = experts_of_sites(input_sites(model))
    with skipping(experts, thresholds_of(saved)):
        expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected)
    assert not torch.allclose(expected, logits(model), atol=0.01)
    torch.testing.assert_close(logits(sparity.load(saved, runtime=False)), logits(model))


def test_saved_again_it_is_the_same(saved, tmp_path):
    loaded = sparity.load(saved)
    loaded.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILE) == load_file(saved / FILE)
    assert torch.equal(logits(sparity.load(tmp_path)), logits(loaded))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_on_the_engine_skipped_experts_are_not_read_and_results_are_the_models(family, monkeypatch):
    config = copy.deepcopy(tiny_configs()[family])
    config.hidden_size = 64
    model = build(config).to(torch.bfloat16)
    experts = experts_of_sites(input_sites(model))
    reads, original = [], PackedExperts._expert
    monkeypatch.setattr(
        PackedExperts, "_expert", lambda self, expert, x: reads.append(len(x)) or original(self, expert, x)
    )
    dense = logits(model)
    with skipping(experts, dict.fromkeys(experts, 0.6)):
        sparse = logits(model)
    with attached(model, form="bitmask") as packed:
        held = experts_of_sites(input_sites(packed))
        assert [type(module) for module in held.values()] == [PackedExperts] * len(experts)
        step = torch.tensor([[7]])
        logits(packed, step)
        whole, reads[:] = sum(reads), []
        with skipping(held, dict.fromkeys(held, 1.0)):
            logits(packed, step)
        assert whole == 2 * len(experts)
        assert reads == [1] * len(experts)  # one expert of each block, for one token
        with skipping(held, dict.fromkeys(held, 0.6)):
            found = logits(packed)
            assert packed.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 28)
    assert apart(found, sparse) < 0.1 * apart(sparse, dense)  # roundings of bfloat16, which turn a choice now and then


def test_what_is_attached_before_the_engine_stays(saved):
    model, plain = (sparity.load(saved, runtime=runtime).to(torch.bfloat16) for runtime in (True, False))
    expected, dense = logits(model), logits(plain)
    with attached(model, form="bitmask") as packed:
        assert all(skip_of(module) is not None for module in experts_of_sites(input_sites(packed)).values())
        assert apart(logits(packed), expected) < 0.1 * apart(expected, dense)


def test_a_packed_checkpoint_is_loaded_with_it(family_models, tmp_path):
    asked = recipe(
        tmp_path,
        {"prune": {"score": "magnitude", "sparsity": 0.5}},
        {"expert_skipping": {}},
        {"cache": {"keep": 0.5}},
        output={"format": "packed"},
    )
    model = copy.deepcopy(family_models["mixtral"]).to(torch.bfloat16)
    result = sparity.run(asked, model=model, output=tmp_path / "out", device="cpu")
    loaded = sparity.load(result.path)
    held = experts_of_sites(input_sites(loaded))
    assert {type(module) for module in held.values()} == {PackedExperts}
    assert all(skip_of(module) is not None for module in held.values())
    assert not torch.equal(logits(loaded), logits(sparity.load(result.path, runtime=False)))


def test_experts_on_disk_are_read_when_they_are_not_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("sparity.dynamic.offload.loading.disk_speeds", lambda bundles, pool, threads: (1e9, 1e9))
    asked = recipe(tmp_path, {"expert_skipping": {"sparsity": 0.9}}, dtype="float32")
    plain = sparity.run(asked, model="zoo:moe", output=tmp_path / "out", device="cpu").path
    needed, traced = {}, {}
    for name, source in (("dense", "zoo:moe"), ("skipping", plain)):
        written = offload(source, tmp_path / name, tokens=IDS.repeat(2, 1), dtype="float32")
        traces = [bundle.trace for bundle in open_bundles(written.folder, read_manifest(written.folder))]
        traced[name] = [float(trace.sum() / len(trace)) for trace in traces]  # experts that a token visits
        with opened(written.folder, written.least_bytes) as far:
            found = logits(far, FAR_IDS)
            needed[name] = far.sparity_offload.counts.bytes
        expected = logits(sparity.load(source, dtype="float32"), FAR_IDS)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert needed["skipping"] < needed["dense"]
    assert traced["dense"] == [2.0] * 6
    assert all(1 < visits < 2 for visits in traced["skipping"])


def test_data_that_does_not_fit_stops_the_load(saved, family_models):
    stage, model, good = ExpertSkipping(), family_models["mixtral"], load_file(saved / FILE)
    first = next(iter(good))
    for data, words in (
        ({**good, first: torch.tensor(0.5)}, "is torch.float32"),
        ({**good, first: torch.tensor(torch.nan).double()}, "nan, not a share of a weight"),
        ({**good, first: torch.tensor(1.5).double()}, "1.5, not a share of a weight"),
        ({**good, first: torch.tensor([0.5]).double()}, r"\[0.5\], not a share"),
        ({**good, "model.layers.9.block_sparse_moe.experts.threshold": good[first]}, r"the unknown model\.layers\.9"),
        ({name: found for name, found in good.items() if name != first}, f"lacks {first}"),
    ):
        with pytest.raises(CorruptFile, match=words), stage.attach(model, input_sites(model), data):
            pass
    for name in ("llama", "qwen3_moe"):
        other = family_models[name]
        with pytest.raises(CorruptFile, match="expert_skipping: the file"):
            stage.attach(other, input_sites(other), good).__enter__()
    assert all(skip_of(module) is None for module in experts_of_sites(input_sites(model)).values())


def test_what_cannot_be_met_is_refused(saved, family_models, tmp_path):
    skip, cache = {"expert_skipping": {}}, {"cache": {"keep": 0.5}}
    mixtral, alone = family_models["mixtral"], copy.deepcopy(tiny_configs()["mixtral"])
    alone.num_experts_per_tok = 1
    for order in ((skip, cache), (cache, skip)):
        prepare(Recipe.read(recipe(tmp_path, *order)), mixtral)
    for model, stages, words in (
        (family_models["llama"], [skip], 'a model of type "llama" has no experts: leave it out'),
        (build(alone), [skip], "each token visits one expert in this model"),
        (mixtral, [skip, skip], "would lose the experts that it chose"),
        (mixtral, [skip, {"prune": {}}], "would lose"),
    ):
        with pytest.raises(InvalidInput, match=words):
            prepare(Recipe.read(recipe(tmp_path, *stages)), model)
    for sparsity in (1.0, -0.1, "half"):
        with pytest.raises(InvalidInput, match="sparsity"):
            Recipe.read(recipe(tmp_path, {"expert_skipping": {"sparsity": sparsity}}))
    loaded = sparity.load(saved)
    experts = experts_of_sites(input_sites(loaded))
    with pytest.raises(InvalidInput, match="skipped in this model already"):
        skipping(experts, dict.fromkeys(experts, 0.5)).__enter__()
