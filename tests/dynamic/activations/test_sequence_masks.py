"""Masks that a prompt decides: by hand, and as they follow prompts, padding, turns, beams, copies and threads."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

import sparity
from families import build, tiny_configs
from sparity import registry
from sparity.dynamic.activations.places import places_of
from sparity.engine.modules.sequences import ATTRIBUTE
from sparity.errors import CorruptFile, InvalidInput
from sparity.models.attached_runtime import input_sites

NAMES = ("griffin", "coreinfer", "tda")
IDS = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))
NEXT = torch.tensor([[5], [6]])


@pytest.fixture(scope="module")
def model():
    return build(tiny_configs()["llama"])


def sparse(model, name, **options):
    return sparity.with_activations(model, IDS, method=name, sparsity=0.5, sites="hidden", **options)


def step(model, tokens, cache, mask=None):
    with torch.no_grad():
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return model(tokens, past_key_values=cache, attention_mask=mask, position_ids=positions).logits


def decisions(cache):
    """What each place decided, by its name."""
    (kept,) = getattr(cache, ATTRIBUTE).values()
    return {place: note.decided for place, note in kept.items()}


# ---- by hand


def test_griffin_by_hand():
    x = torch.tensor([[[3.0, 0.0, 4.0, 0.0], [0.0, 0.0, -2.0, 0.0], [0.0, 10.0, 0.0, 0.0]]])
    # norms: 5, 2, 10; squares of the shares add up to 0.36, 1, 0.64 + 1, 0
    assert sparity.activation_mask(x, method="griffin", sparsity=0.5).tolist() == [[[False, True, True, False]] * 3]
    assert sparity.activation_mask(x, method="griffin", sparsity=0.25).tolist() == [[[True, True, True, False]] * 3]
    nothing = torch.zeros(1, 2, 4)
    assert sparity.activation_mask(nothing, method="griffin", sparsity=0.5)[0, 0].tolist() == [True, True, False, False]


def test_griffin_is_the_published_statistic():
    x = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1))
    statistic = (x / x.norm(dim=-1, keepdim=True)).norm(dim=1)  # [samples, neurons]
    top = statistic.topk(int(64 * 0.6)).indices
    wanted = torch.zeros(3, 64, dtype=torch.bool).scatter(1, top, True)[:, None].expand(x.shape)
    assert torch.equal(sparity.activation_mask(x, method="griffin", sparsity=0.4), wanted)


def test_coreinfer_by_hand():
    x = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [4.0, -9.0, 3.0, -1.0], [-1.0, 1.0, 2.0, -3.0]]])
    # cores, half of what is above 0: (0, 1), (0), (2)
    for sparsity, wanted in ((0.75, [True, False, False, False]), (0.25, [True, True, True, False])):
        mask = sparity.activation_mask(x, method="coreinfer", sparsity=sparsity, of_token=0.5)
        assert mask.tolist() == [[wanted] * 3]


def test_tda_by_hand():
    x = torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[10.0, 20.0], [-30.0, 40.0]]])
    mask = sparity.activation_mask(x, method="tda", sparsity=0.5)
    assert mask.tolist() == [[[False, False], [True, True]]] * 2  # each sample has its own threshold


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bins_of_tda_hold_its_quantile(dtype):
    method = registry.build("activations.method", "tda")
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0, 0, 0] = torch.nan
    rule = method.rule({"share": torch.tensor(0.5, dtype=torch.float64)}, 16, "x")
    sums = rule.empty(2, 16, x.device)
    for piece in x.split((7, 1, 22), dim=1):
        rule.add(sums, piece, torch.ones(piece.shape[:2], dtype=torch.bool))
    found = rule.keep(rule.decide(sums), x)
    exact = sparity.activation_mask(x, method="tda", sparsity=0.5)
    if dtype == torch.bfloat16:
        assert torch.equal(found[1], exact[1])
    assert float((found != exact).double().mean()) <= 0.01
    infinite = rule.empty(1, 1, x.device)
    rule.add(infinite, torch.full((1, 3, 1), torch.inf), torch.ones(1, 3, dtype=torch.bool))
    assert rule.decide(infinite).tolist() == [torch.inf]


# ---- in a model


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_dense_and_decides_for_what_follows(name, model):
    dense_cache = DynamicCache()
    dense = step(model, IDS, dense_cache), step(model, NEXT, dense_cache)
    with sparse(model, name) as running:
        cache = DynamicCache()
        assert torch.equal(step(running, IDS, cache), dense[0])
        assert not torch.equal(step(running, NEXT, cache), dense[1])
        before = {place: value.clone() for place, value in decisions(cache).items()}
        step(running, NEXT + 1, cache)
        assert all(torch.equal(value, before[place]) for place, value in decisions(cache).items())


def test_griffin_masks_by_hand_in_a_model(model):
    place = next(p for p in places_of(model, input_sites(model), "hidden") if ".1." in p.name)
    seen = []
    with sparse(model, "griffin") as running:
        handle = place.module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        cache = DynamicCache()
        step(running, IDS, cache)
        step(running, NEXT, cache)
        handle.remove()
        kept = sparity.activation_mask(seen[0], method="griffin", sparsity=0.5)[:, :1]
        assert torch.equal(seen[1] == 0, ~kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(24,), (8, 16), (5, 5, 14), (2, 20, 2)])
def test_the_pieces_in_which_a_prompt_comes_do_not_matter(name, pieces, model):
    with sparse(model, name) as running:
        whole, cut = DynamicCache(), DynamicCache()
        step(running, IDS, whole)
        for piece in IDS.split(pieces, dim=1):
            step(running, piece, cut)
        assert torch.allclose(step(running, NEXT, cut), step(running, NEXT, whole), atol=1e-5)
        for place, value in decisions(whole).items():
            assert torch.allclose(decisions(cut)[place].double(), value.double(), rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_left_takes_no_part(name, model):
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    later = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with sparse(model, name) as running:
        together, alone = DynamicCache(), DynamicCache()
        step(running, IDS, together, mask)
        step(running, IDS[1:, 9:], alone)
        both, one = step(running, NEXT, together, later), step(running, NEXT[1:], alone)
        for place, value in decisions(alone).items():
            assert torch.allclose(decisions(together)[place][1:].double(), value.double(), rtol=0.01)
        assert torch.allclose(both[1:], one, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_of_a_second_turn_decides_anew(name, model):
    with sparse(model, name) as running:
        cache = DynamicCache()
        for tokens in (IDS, NEXT):
            step(running, tokens, cache)
        first = decisions(cache)
        other = IDS.flip(1)[:, :11]
        step(running, other, cache)
        assert not any(value is not None for value in decisions(cache).values())
        step(running, NEXT, cache)
        second = decisions(cache)
        assert any(not torch.equal(value, first[place]) for place, value in second.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}])
def test_generation_of_all_kinds_with_one_decision_per_prompt(name, options, model):
    rows = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    with sparse(model, name) as running:
        found = running.generate(
            rows, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        plain = running.generate(rows, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    beams = options.get("num_beams", 1)
    for value in decisions(found.past_key_values).values():
        assert len(value) == len(rows) * beams
        groups = value.view(len(rows), beams, -1).double()
        assert torch.allclose(groups, groups[:, :1].expand_as(groups), rtol=0.01)  # so beams may change places
    if beams == 1:
        assert torch.equal(found.sequences, plain)


@pytest.mark.parametrize("name", NAMES)
def test_of_a_text_that_is_scored_the_first_part_is_the_prompt(name, model):
    with torch.no_grad():
        dense = model(IDS, use_cache=False).logits
        with sparse(model, name, scored=0.5) as running:
            found = running(IDS, use_cache=False).logits
            assert torch.equal(found[:, :12], dense[:, :12])
            assert not torch.equal(found[:, 12], dense[:, 12])
            made = running(IDS).past_key_values  # a cache of the model's own goes on with what was decided
            before = decisions(made)
            step(running, NEXT, made)
            assert all(value is before[place] for place, value in decisions(made).items())


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_caches_and_models_go_on_alike(name, model):
    with sparse(model, name) as running:
        cache = DynamicCache()
        step(running, IDS, cache)
        copied, third = copy.deepcopy(cache), copy.deepcopy(cache)
        wanted = step(running, NEXT, cache)
        assert torch.equal(step(running, NEXT, copied), wanted)
        assert torch.equal(step(copy.deepcopy(running), NEXT, third), wanted)


def test_threads_and_interleaved_sequences_do_not_meet(model):
    with sparse(model, "griffin") as running:
        alone = []
        for row in (0, 1):
            cache = DynamicCache()
            step(running, IDS[row : row + 1], cache)
            alone.append(step(running, NEXT[row : row + 1], cache))
        caches = DynamicCache(), DynamicCache()
        for row, cache in enumerate(caches):
            step(running, IDS[row : row + 1], cache)
        for row, cache in enumerate(caches):
            assert torch.equal(step(running, NEXT[row : row + 1], cache), alone[row])
        found, start = {}, threading.Barrier(2)

        def run(row):
            cache = DynamicCache()
            start.wait()
            step(running, IDS[row : row + 1], cache)
            start.wait()
            found[row] = step(running, NEXT[row : row + 1], cache)

        threads = [threading.Thread(target=run, args=(row,)) for row in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[row], alone[row]) for row in (0, 1))


def test_what_cannot_be_followed_is_refused(model):
    seen_dense = DynamicCache()
    step(model, IDS, seen_dense)
    with sparse(model, "griffin") as running:
        with pytest.raises(InvalidInput, match="activations were not seen"):
            step(running, NEXT, seen_dense)
        cache = DynamicCache()
        step(running, IDS, cache)
        step(running, NEXT, cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(InvalidInput, match="has 4 rows, and had 2"):
            step(running, NEXT.repeat_interleave(2, 0), cache)
    with pytest.raises(InvalidInput, match="learns from the prompt"), sparse(model, "griffin", prompt="sparse"):
        pass
    for options, words in (({"scored": 1.0}, "scored 1.0"), ({"of_token": 0.0}, "of_token 0.0")):
        with pytest.raises(InvalidInput, match=words):
            registry.build("activations.method", {"coreinfer": options})
    method = registry.build("activations.method", "griffin")
    for kept, words in ((torch.tensor(9), "kept is 9, not 1 to 8"), (torch.tensor(1.0), "kept is float32")):
        with pytest.raises(CorruptFile, match=words):
            method.mask({"kept": kept}, torch.ones(1, 2, 8))
    tda = registry.build("activations.method", "tda")
    with pytest.raises(CorruptFile, match=r"share is 2\.0"):
        tda.mask({"share": torch.tensor(2.0, dtype=torch.float64)}, torch.ones(1, 2, 8))


def test_a_flattened_hidden_layer_is_followed_too():
    model = build(tiny_configs()["opt"])
    with sparse(model, "griffin") as running:
        cache = DynamicCache()
        step(running, IDS, cache)
        step(running, NEXT, cache)
        assert {len(value) for value in decisions(cache).values()} == {2}
