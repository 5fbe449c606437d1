"""The stage `attention_blocks`: calibrated, saved with the model, loaded and attached again, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file

import sparity
from sparity.dynamic.attention_blocks import AttentionStage
from sparity.errors import CorruptFile, InvalidInput
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.recipe import Recipe

FILE = "sparity-dynamic/00-attention_blocks.safetensors"
IDS = torch.randint(3, 90, (2, 64), generator=torch.Generator().manual_seed(2))
OPTIONS = {"layout": {"spargeattn": {"sinks": 4, "similarity": -1.0, "threshold": 0.5}}, "block": 8, "shortest": 32}


def recipe(*stages):
    return {"stages": list(stages), "measure": {"speed": None}}


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@pytest.fixture(scope="module")
def saved(family_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("attention") / "out"
    return sparity.run(
        recipe({"attention_blocks": OPTIONS}), model=family_models["llama"], output=out, device="cpu"
    ).path


def test_what_was_saved_computes_as_the_context_does(saved, family_models):
    model, more = family_models["llama"], OPTIONS["layout"]["spargeattn"]
    with sparity.with_attention_blocks(model, method="spargeattn", block=8, **more):
        expected, short = logits(model), logits(model, IDS[:, :24])
    loaded = sparity.load(saved)
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(expected, logits(model))
    assert torch.equal(logits(loaded, IDS[:, :24]), logits(model, IDS[:, :24]))  # shorter than `shortest`
    assert not torch.equal(short, logits(model, IDS[:, :24]))
    assert torch.equal(logits(sparity.load(saved, runtime=False)), logits(model))


def test_shares_keep_the_error_that_was_asked_for(family_models):
    model = family_models["llama"]
    asked = {"method": "spargeattn", "block": 8, "sinks": 4, "similarity": -1.0}
    wide, near = (sparity.calibrate_attention(model, IDS, error=error, **asked) for error in (0.5, 0.05))
    assert [each.shape for each in near] == [(4,)] * 3
    assert all(bool((a <= b).all()) for a, b in zip(wide, near, strict=True))
    dense, moved = logits(model), []
    for shares in (wide, near):
        with sparity.with_attention_blocks(model, shares=shares, **asked):
            moved.append(float((logits(model) - dense).abs().mean()))
    assert moved[0] > moved[1]


def test_a_share_of_one_everywhere_gives_the_models_bits(family_models):
    model = family_models["llama"]
    with sparity.with_attention_blocks(model, method="local", window=4, block=8, shares=[torch.ones(4).double()] * 3):
        found = logits(model)
    assert torch.equal(found, logits(model))


def test_data_that_does_not_fit_stops_the_load(saved, family_models):
    stage, model, good = AttentionStage.model_validate(OPTIONS), family_models["llama"], load_file(saved / FILE)
    first = next(iter(good))
    for data, words in (
        ({**good, first: torch.ones(4)}, "is torch.float32"),
        ({**good, first: torch.full((4,), 1.5).double()}, "not 4 shares"),
        ({**good, "model.layers.9.self_attn.k_proj.share": good[first]}, "holds the unknown model.layers.9"),
        ({name: share for name, share in good.items() if name != first}, f"lacks {first}"),
    ):
        with pytest.raises(CorruptFile, match=words), stage.attach(model, input_sites(model), data):
            pass
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_met_is_refused(family_models):
    model, attention, cache = family_models["llama"], {"attention_blocks": OPTIONS}, {"cache": {"keep": 0.5}}
    prepare(Recipe.read(recipe(attention, cache)), model)
    for stages, words in (
        ((attention, attention), "the blocks of attention that it chose"),
        ((cache, attention), "what it keeps in the cache"),
        (({"attention_blocks": {"layout": "locl"}},), 'no layout "locl"; did you mean "local"'),
    ):
        with pytest.raises(InvalidInput, match=words):
            prepare(Recipe.read(recipe(*stages)), model)
    for options, words in (
        ({"error": 0.0}, "must lie between 0 and 1"),
        ({"error": 0.1, "block": 32}, "texts of 64 tokens are too short"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.calibrate_attention(model, IDS, **{"method": "local", "block": 8, **options})
    for options, words in (({"shortest": 0}, "1 or more"), ({"shares": [torch.ones(3)]}, "3 tensors")):
        with (
            pytest.raises(InvalidInput, match=words),
            sparity.with_attention_blocks(model, method="local", block=8, **options),
        ):
            pass
