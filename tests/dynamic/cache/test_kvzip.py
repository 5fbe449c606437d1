"""KVzip: what is looked at when a text is read again, which tokens of all layers stay, and that the reading is gone."""

import copy
import math

import pytest
import torch

import sparity
from masked_dense import calls_of
from sparity.dynamic.cache.reconstruction import looked_at
from sparity.dynamic.cache.rereading import _chosen
from sparity.dynamic.cache.seen import Seen
from sparity.errors import InvalidInput

IDS = torch.randint(3, 90, (1, 26), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plus", [False, True])
def test_the_largest_weight_of_any_query_of_any_head(plus):
    queries, keys, values = drawn(1, 4, 3, 8), drawn(1, 2, 7, 8, seed=1), drawn(1, 2, 7, 8, seed=2)
    weight, hidden = drawn(4, 8, 16, seed=3), drawn(1, 3, 16, seed=4)
    found = looked_at(Seen(queries, keys, values, 0.5, output_weight=weight, hidden=hidden), plus)
    for head in range(2):
        for token in range(7):
            paid = []
            for query in range(3):
                for member in (2 * head, 2 * head + 1):
                    logits = [0.5 * float(queries[0, member, query] @ keys[0, head, j]) for j in range(5 + query)]
                    share = math.exp(logits[token]) / sum(map(math.exp, logits)) if token < len(logits) else 0.0
                    if plus:
                        size = float((values[0, head, token] @ weight[member]).norm())
                        share *= size / float(hidden[0, query].norm())
                    paid.append(share)
            assert float(found[0, head, token]) == pytest.approx(max(paid), rel=1e-4)


def plain_scores(model, chunk, lead, request, sinks):
    """Scores of every layer, head and token, by the published algorithm."""
    past = model(IDS, use_cache=True).past_key_values
    length, scores = IDS.shape[1], torch.zeros(3, 2, IDS.shape[1])
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        text = torch.cat([torch.tensor([request], dtype=torch.int64), IDS[:, max(start - lead, 0) : end]], 1)
        known = copy.deepcopy(past)
        for index, (module, named) in enumerate(attention_calls(model, text, past_key_values=known)):
            query, keys = rotated(module, named), known.layers[index].keys[0]
            seen = [*range(min(sinks, start)), *range(start, end), *range(length, length + text.shape[1])]
            for head in range(2):
                for row in range(text.shape[1]):
                    now = [place for place in seen if place <= length + row]
                    for member in (2 * head, 2 * head + 1):
                        logits = keys[head, now] @ query[0, member, row] * module.scaling
                        shares = logits.softmax(0)
                        for place, share in zip(now, shares, strict=True):
                            if start <= place < end:
                                scores[index, head, place] = max(float(share), float(scores[index, head, place]))
    return scores


def attention_calls(model, ids, **given):
    """The attention modules of a Llama, and what they are called with by name, in one call of the model."""
    taken = []
    hooks = [
        block.self_attn.register_forward_pre_hook(lambda m, a, named: taken.append((m, named)), with_kwargs=True)
        for block in model.model.layers
    ]
    model(ids, **given)
    for hook in hooks:
        hook.remove()
    return taken


def rotated(module, named):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden = named["hidden_states"]
    query = module.q_proj(hidden).view(*hidden.shape[:-1], -1, module.head_dim).transpose(1, 2)
    return apply_rotary_pos_emb(query, query, *named["position_embeddings"])[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("chunk", "lead", "request_ids"), [(2048, 8, []), (10, 3, [5, 6, 7])], ids=["at once", "in pieces"]
)
def test_the_tokens_of_all_layers_that_stay_are_those_of_the_published_algorithm(model, chunk, lead, request_ids):
    scores = plain_scores(model, chunk, lead, request_ids, 4)
    scores[..., :4] = 2
    scores[..., -3:] = 2
    kept = scores.flatten() >= scores.flatten().topk(6 * 10).values[-1]  # ten of each head, on average
    options = {"chunk": chunk, "lead": lead, "request": request_ids}
    dense = model(IDS)
    with sparity.cache(model, "kvzip", 10, recent=3, **options):
        output = model(IDS)
    assert torch.equal(output.logits, dense.logits)
    assert int(kept.sum()) == 60
    for index, layer in enumerate(output.past_key_values.layers):
        for head in range(2):
            keys, values, places = layer.store.segment(0, head)
            wanted = kept.view(3, 2, -1)[index, head].nonzero().flatten()
            assert torch.equal(places.long(), wanted)
            assert torch.equal(keys, dense.past_key_values.layers[index].keys[0, head, wanted])
            assert torch.equal(values, dense.past_key_values.layers[index].values[0, head, wanted])
    assert output.past_key_values.get_seq_length() == 26


def test_heads_share_the_budget_of_all_layers_or_of_their_own():
    orders = [[torch.tensor([9.0, 1.0]), torch.tensor([8.0, 7.0])], [torch.tensor([2.0, -torch.inf])] * 2]
    together = _chosen(orders, [2, 2], True)
    assert [[each.tolist() for each in layer] for layer in together] == [
        [[True, False], [True, True]],
        [[False, False], [True, False]],  # of equal ones the later
    ]
    apart = _chosen(orders, [2, 2], False)
    assert [[each.tolist() for each in layer] for layer in apart] == [
        [[True, False], [True, False]],
        [[True, False], [True, False]],
    ]


@torch.no_grad()
def test_layers_with_a_window_are_as_they_were_and_embeddings_are_read_again_too(family_models):
    model = family_models["gemma2"]
    dense = model(IDS).past_key_values
    with sparity.cache(model, "kvzip", 9, recent=2):
        past = model(IDS).past_key_values
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).past_key_values
    for index in (0, 2):
        assert torch.equal(past.layers[index].keys, dense.layers[index].keys)
        assert past.layers[index].get_seq_length() == 26
    lists = [[cache.layers[1].store.segment(0, head)[2].tolist() for head in range(2)] for cache in (past, embedded)]
    assert sum(map(len, lists[0])) == 18
    assert lists[0] == lists[1]


@torch.no_grad()
def test_a_later_prompt_is_read_again_alone_and_decoded_tokens_were_never_scored(model):
    calls = calls_of((0,), 30, 1, 1, 40)
    with sparity.cache(model, "kvzip", 20, recent=2):
        past = model(**calls[0]).past_key_values
        first = [layer.store.segment(0, 0)[2].tolist() for layer in past.layers]
        for call in calls[1:3]:
            model(**call, past_key_values=past)
        for layer, before in zip(past.layers, first, strict=True):
            assert layer.store.segment(0, 0)[2].tolist() == [*before, 30, 31]
        model(**calls[3], past_key_values=past)
    assert sum(int(layer.store.lengths.sum()) for layer in past.layers) == 3 * 2 * 20
    for layer in past.layers:
        for head in range(2):
            assert {0, 1, 2, 3, 30, 31, 70, 71} <= {*layer.store.segment(0, head)[2].tolist()}


@torch.no_grad()
def test_what_stays_may_be_stored_in_bits_and_read_by_pages(model):
    more = {"store": {"kivi": {"bits": 4, "group": 4, "residual": 4}}, "read": {"quest": {"page": 4, "dense": 0}}}
    with sparity.cache(model, "kvzip", 12, recent=2, read_keep=6, **more):
        past = model(IDS).past_key_values
        assert sum(int(layer.store.packed.lengths.sum()) for layer in past.layers) > 0
        assert model(IDS[:, :1], past_key_values=past).logits.isfinite().all()


@torch.no_grad()
def test_a_text_that_learned_positions_do_not_allow_twice_is_refused(family_models):
    most = family_models["gpt2"].config.max_position_embeddings
    ids = torch.randint(3, 90, (1, most - 4))
    with (
        sparity.cache(family_models["gpt2"], "kvzip", 10, recent=2),
        pytest.raises(InvalidInput, match="reads a prompt a second time"),
    ):
        family_models["gpt2"](ids)
