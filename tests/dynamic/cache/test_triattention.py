"""TriAttention: the published series, heads taken together, and centres that are saved with the model."""

import copy
import math

import pytest
import torch
from learned import learned_of
from safetensors.torch import load_file

import sparity
from sparity.dynamic.cache.policies.triattention import standardised

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
FILE = "sparity-dynamic/00-cache.safetensors"


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def published(centre, spans, keys, base, furthest):
    """Scores of one query head by the paper's series of cosines; keys `[tokens, 2 pairs]` are after rotary."""
    pairs, tokens = len(spans), len(keys)
    distances = [2**power for power in range(furthest.bit_length())]
    scores = []
    for place in range(tokens):
        total = 0.0
        for distance in distances:
            for pair in range(pairs):
                speed = base ** (-2 * pair / (2 * pairs))
                query = complex(float(centre[pair]), float(centre[pair + pairs]))
                turned = complex(float(keys[place, pair]), float(keys[place, pair + pairs]))
                key = turned * complex(math.cos(speed * place), -math.sin(speed * place))  # before rotary
                relative = query * key.conjugate()
                phase = math.atan2(relative.imag, relative.real)
                angle = speed * (tokens - place + distance) + phase
                total += abs(query) * abs(key) * math.cos(angle)
                total += (float(spans[pair]) - abs(query)) * abs(key)
        scores.append(total / len(distances))
    return scores


@pytest.mark.parametrize("group", ["max", "mean"])
def test_scores_are_the_published_series(group):
    generator = torch.Generator().manual_seed(2)
    queries, keys = torch.randn(1, 4, 9, 6, generator=generator), torch.randn(1, 2, 9, 6, generator=generator)
    centres = torch.randn(4, 6, generator=generator)
    spans = torch.hypot(centres[:, :3], centres[:, 3:]) + torch.rand(4, 3, generator=generator)
    named = {"centres": centres, "spans": spans, "furthest": 20, "base": 50.0, "group": group, "window": 1}
    found = sparity.score_cache(queries, keys, keys, policy="triattention", **named)
    each = [published(centres[head], spans[head], keys[0, head // 2], 50.0, 20) for head in range(4)]
    together = max if group == "max" else lambda two: sum(two) / 2
    for head in range(2):
        wanted = [together(two) for two in zip(each[2 * head], each[2 * head + 1], strict=True)]
        assert found[0, head, :-1].tolist() == pytest.approx(wanted[:-1], abs=1e-4)
        assert found[0, head, -1] == found[0, head].max()


def test_heads_are_put_on_one_scale_before_they_are_compared():
    scores = torch.tensor([[1.0, 3.0, 50.0], [10.0, 30.0, -50.0]])[None, None]
    present = torch.tensor([True, True, False]).view(1, 1, 3)
    assert standardised(scores, present)[0, 0, :, :2].tolist() == [[-1, 1], [-1, 1]]
    assert torch.allclose(standardised(scores, None).std(-1, unbiased=False), torch.ones(1, 1, 2))


@torch.no_grad()
def test_centres_are_saved_with_the_model_and_choose_as_in_a_context(family_models, token_files, tmp_path):
    model = family_models["llama"]
    options = {"policy": {"triattention": {"window": 4, "normalise": True}}, "keep": 0.3, "sinks": 2, "recent": 2}
    recipe = {
        "stages": [{"cache": options}],
        "calibration": {"tokens": token_files["calibration"]},
        "measure": {"speed": None},
    }
    path = sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu").path
    data = load_file(path / FILE)
    name = "model.layers.1.self_attn.k_proj"
    assert data[f"{name}.centres"].shape == (4, 8)
    assert data[f"{name}.spans"].shape == (4, 4)
    kinds, names = ("centres", "spans"), [name.replace(".1.", f".{index}.") for index in range(3)]
    learned = [{kind: data[f"{each}.{kind}"] for kind in kinds} for each in names]
    with sparity.cache(model, options["policy"], 0.3, sinks=2, recent=2, learned=learned):
        expected = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    loaded = sparity.load(path)
    assert torch.equal(
        loaded.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None), expected
    )


@torch.no_grad()
def test_the_cache_grows_until_it_is_evicted_from_again(model):
    sizes = []
    with sparity.cache(
        model, "triattention", 12, window=4, sinks=2, recent=2, every=4, **learned_of(model, "triattention")
    ):
        past = model(IDS).past_key_values
        for place in range(9):
            model(IDS[:, place : place + 1], past_key_values=past)
            sizes.append(int(past.layers[0].store.lengths[0]))
    assert sizes == [13, 14, 15, 12, 13, 14, 15, 12, 13]
