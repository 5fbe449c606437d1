"""PQCache: codebooks, codes, what is chosen by them, and what a model reads of its cache."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparity
from masked_dense import called, calls_of
from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.codebooks import codebooks, nearest, products
from sparity.dynamic.cache.coded_store import CodedStore
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.in_place import pages_of
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.speculate.exact import generate_exact
from sparity.engine.kernels.attention.cpu import Chosen
from sparity.errors import InvalidInput

SIZES = (24, 10, 1, 1, 1, 5, 1)
SMALL = {"pqcache": {"bits": 2}}


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_centroids_and_codes_by_hand():
    vectors = torch.tensor([[0.0, 5.0], [1.0, -5.0], [10.0, 5.0], [11.0, -5.0]])
    # the first part begins at 0 and 10, the second at 5 and 5, where all are nearest to the first of the two
    books = codebooks(vectors, parts=2, bits=1, iterations=10)
    assert books.tolist() == [[[0.5], [10.5]], [[-5.0], [5.0]]]
    assert codebooks(vectors, 2, 1, 0).tolist() == [[[0.0], [10.0]], [[5.0], [5.0]]]
    assert codebooks(vectors, 2, 1, 1).tolist() == [[[0.5], [10.5]], [[0.0], [5.0]]]
    codes = nearest(vectors, books)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[0, 1], [0, 0], [1, 1], [1, 0]]
    assert products(torch.tensor([[2.0, 1.0], [0.0, -1.0]]), codes, books).tolist() == [[6, -4, 26, 16], [-5, 5, -5, 5]]


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 40), bits=st.integers(1, 4), parts=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_codebooks_are_those_of_k_means_written_plainly(tokens, bits, parts, seed):
    vectors = drawn(tokens, 8, seed=seed)
    books = codebooks(vectors, parts, bits, 3)
    for part, found in zip(vectors.split(8 // parts, 1), books, strict=True):
        count = min(2**bits, tokens)
        centroids = [part[i * tokens // count] for i in range(count)]
        for _ in range(3):
            owners = [min(range(count), key=lambda c: float((v - centroids[c]).square().sum())) for v in part]
            mine = [[v for v, owner in zip(part, owners, strict=True) if owner == c] for c in range(count)]
            centroids = [torch.stack(each).mean(0) if each else centroids[c] for c, each in enumerate(mine)]
        assert torch.allclose(found, torch.stack(centroids), atol=1e-5)
    codes = nearest(vectors, books)
    decoded = torch.cat([books[part][codes[:, part].long()] for part in range(parts)], 1)
    queries = drawn(3, 8, seed=seed + 1)
    assert torch.allclose(products(queries, codes, books), queries @ decoded.T, atol=1e-5)


def test_scores_are_the_weights_of_the_last_query_by_codes():
    queries, keys = drawn(1, 4, 30, 8), drawn(1, 2, 30, 8, seed=1)
    found = sparity.score_cache(queries, keys, keys, policy="pqcache", bits=2, scaling=0.7, softcap=2.0)
    for head in range(2):
        books = codebooks(keys[0, head], 2, 2, 10)
        codes = nearest(keys[0, head], books).long()
        decoded = torch.cat([books[0][codes[:, 0]], books[1][codes[:, 1]]], 1)
        logits = 2 * torch.tanh(queries[0, 2 * head : 2 * head + 2, -1] @ decoded.T * 0.7 / 2)
        assert torch.allclose(found[0, head], logits.softmax(-1).mean(0), atol=1e-6)


def test_with_a_centroid_for_every_key_what_is_paid_most_stays():
    queries, keys = drawn(2, 4, 40, 8), drawn(2, 2, 40, 8, seed=1)
    kept = sparity.select_cache(queries, keys, keys, policy="pqcache", keep=9, bits=6, sinks=1, recent=2)
    paid = (queries[:, :, -1:] @ keys.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5).softmax(-1)
    paid = paid.view(2, 2, 2, 40).mean(2)
    paid[..., 0] = paid[..., -2:] = torch.inf
    best = torch.zeros(2, 2, 40, dtype=torch.bool).scatter_(2, paid.topk(9).indices, True)
    assert torch.equal(kept, best)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [6, 32])  # the second is read by the compiled kernels, where there are any
def test_attention_to_what_was_found_is_attention_to_those_tokens(ragged, width):
    keys, values = drawn(2, 2, 30, width), drawn(2, 2, 30, width, seed=1)
    reader = policy_of({"pqcache": {"bits": 3}})
    store = CodedStore(keys, values, 0, False, reader)
    held = [torch.arange(30) % (3 + head if ragged else 3) > 0 for head in range(4)]
    store.keep(held)
    query = drawn(2, 4, 1, width, seed=3)
    chosen = store.chosen(query, [11, 7], (1, 2), 29, 0.5, None)
    given = Chosen(torch.cat(chosen).int(), torch.tensor([len(x) for x in chosen]).cumsum(0))
    for form in (chosen, given):
        found = attend(query, store, Sight(None, 2, 1, 30), 0.5, form)
        for row in range(2):
            for head in range(2):
                own = held[2 * row + head].nonzero().flatten()
                books = codebooks(keys[row, head, own[own < 29]], 2, 3, 10)  # of the keys before the query's own
                codes = nearest(keys[row, head, own], books)
                heads = query[row, 2 * head : 2 * head + 2, 0]
                weights = (products(heads, codes, books) * 0.5).softmax(-1).mean(0)
                weights[0] = weights[-2:] = torch.inf
                order = weights.flip(0).sort(descending=True, stable=True).indices  # of equal ones the later
                best = (len(weights) - 1 - order[: (11, 7)[row]]).sort().values
                assert chosen[2 * row + head].tolist() == best.tolist()
                tokens = own[best]
                exact = (heads @ keys[row, head, tokens].T * 0.5).softmax(-1) @ values[row, head, tokens]
                assert torch.allclose(found[row, 0, 2 * head : 2 * head + 2], exact, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50), data=st.data())
def test_every_slot_has_the_code_of_its_key_after_anything(seed, data):
    reader = policy_of({"pqcache": {"bits": 2, "parts": 4}})
    store = CodedStore(drawn(2, 2, 12, 8, seed=seed), drawn(2, 2, 12, 8), 0, False, reader)
    store.chosen(drawn(2, 2, 1, 8), [3, 3], (0, 0), 11, 1.0, None)
    for step in range(data.draw(st.integers(1, 4))):
        new = data.draw(st.integers(1, 40))
        store.append(drawn(2, 2, new, 8, seed=seed + step), drawn(2, 2, new, 8), 100 * (step + 1))
        if data.draw(st.booleans()):
            masks = [drawn(int(n), seed=seed) < 0.6 for n in store.lengths]
            store.keep([mask | (torch.arange(len(mask)) == 0) for mask in masks])
            store.select_rows(torch.tensor(data.draw(st.sampled_from([[1, 0], [1, 1]]))))
        for number in range(4):
            cut = store.cut(*divmod(number, 2))
            assert torch.equal(store.buffers["codes"][cut], nearest(store.keys[cut], store.books[number]))


def test_bytes_are_those_of_keys_values_places_codes_and_centroids():
    store = CodedStore(drawn(1, 2, 40, 8), drawn(1, 2, 40, 8), 0, False, policy_of({"pqcache": {"bits": 3}}))
    slots = 2 * (40 + 16)  # of each head, with the room to grow
    assert store.nbytes == slots * (32 + 32 + 4 + 2)
    store.chosen(drawn(1, 2, 1, 8), [9], (0, 0), 39, 1.0, None)
    assert store.nbytes == slots * (32 + 32 + 4 + 2) + 2 * 8 * 8 * 4
    store.select_rows(torch.tensor([0, 0]))  # beams share what does not change
    assert store.nbytes == 2 * slots * (32 + 32 + 4 + 2) + 2 * 8 * 8 * 4


def test_a_model_reads_what_is_chosen_by_the_keys_before_and_holds_everything(model, monkeypatch):
    calls, seen = calls_of((0, 0), 33, 1, 1), []
    choose = PolicyLayer.chosen

    def spied(self, query, *more):
        found = choose(self, query, *more)
        if found is not None:
            seen.append((self.index, found, query.clone(), *(x.clone() for x in self.store.views()[:2]), more[1]))
        return found

    monkeypatch.setattr(PolicyLayer, "chosen", spied)
    with sparity.cache(model, SMALL, 0.4, sinks=2, recent=2):
        past = model(**calls[0]).past_key_values
        found = [model(**call, past_key_values=past).logits for call in calls[1:]]
    assert [int(layer.store.lengths[0]) for layer in past.layers] == [35] * 3
    assert [each[0] for each in seen] == [0, 1, 2] * 2
    for _, chosen, query, keys, _, scaling in seen:
        each = pages_of(chosen) if isinstance(chosen, Chosen) else list(chosen.flatten(0, 1))
        for number in range(4):
            row, head = divmod(number, 2)
            books = codebooks(keys[row, head, :33], 2, 2, 10)  # of the prompt, for the second token too
            heads = query[row, 2 * head : 2 * head + 2, 0]
            weights = (products(heads, nearest(keys[row, head], books), books) * scaling).softmax(-1).mean(0)
            weights[:2] = weights[-2:] = torch.inf
            order = weights.flip(0).sort(descending=True, stable=True).indices[: int(0.4 * keys.shape[2])]
            assert each[number].tolist() == (keys.shape[2] - 1 - order).sort().values.tolist()
    assert not torch.allclose(found[0], called(model, calls[:2])[1], atol=1e-3)


def test_a_prompt_in_pieces_is_the_prompt_at_once(model):
    with sparity.cache(model, SMALL, 0.3, sinks=1, recent=1):
        whole = called(model, calls_of((0, 3), 34, 1, 1))
        pieces = called(model, calls_of((0, 3), 24, 10, 1, 1))
    for once, apart in zip(whole[1:], pieces[2:], strict=True):
        assert torch.allclose(once, apart, atol=1e-5)


@pytest.mark.parametrize("policy", ["snapkv", "adakv", "h2o"])
def test_what_a_policy_left_is_read_by_codes(policy, model):
    options = {"sinks": 2, "recent": 2, **({} if policy == "h2o" else {"window": 4})}
    calls = calls_of((0, 7), *SIZES)
    with sparity.cache(model, policy, 0.6, **options):
        everything = called(model, calls)
    with sparity.cache(model, policy, 0.6, read=SMALL, read_keep=1.0, **options):
        assert all(torch.equal(*pair) for pair in zip(called(model, calls), everything, strict=True))
    with sparity.cache(model, policy, 0.6, read=SMALL, read_keep=0.2, **options):
        found = called(model, calls)
        alone = [{"input_ids": call["input_ids"][1:]} for call in calls]
        alone[0] = {"input_ids": calls[0]["input_ids"][1:, 7:]}
        for together, single in zip(found[1:], called(model, alone)[1:], strict=True):
            assert torch.allclose(together[1:], single, atol=3e-5 * float(single.abs().max()))
    assert not torch.allclose(found[2], everything[2], atol=1e-4)


def test_tokens_that_are_taken_back_leave_no_trace(model):
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    with sparity.cache(model, SMALL, 0.3, sinks=1, recent=1), torch.no_grad():
        used, fresh = model(ids[:, :30]).past_key_values, model(ids[:, :24]).past_key_values
        for place in (30, 31):
            model(ids[:, place : place + 1], past_key_values=used)
        used.crop(-8)  # behind the tokens on which centroids rest
        assert torch.allclose(
            model(ids[:, 24:25], past_key_values=used).logits,
            model(ids[:, 24:25], past_key_values=fresh).logits,
            atol=1e-5,
        )
        assert used.layers[0].store.found_at == 24
        used.crop(-1)
        assert used.layers[0].store.found_at == 24
    with sparity.cache(model, SMALL, 0.3, sinks=1, recent=1):
        answer = generate_exact(model, ids[:1], max_new_tokens=8, eos_token_id=None)
        beams = model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    whole = model.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert answer.ids.flatten().tolist()[-8:] == whole[0, -8:].tolist()
    assert beams.shape == (2, 44)


def test_what_cannot_be_met_is_refused(model):
    for arguments, options, words in (
        (("pqcache",), {"store": "kivi"}, "pqcache keeps tokens as they are"),
        (("pqcache",), {"read": "quest"}, 'the policy "pqcache" says which tokens are read'),
        (("pqcache", [0.5, 0.5, 0.5]), {}, "pqcache reads one share in all layers"),
        (("pqcache",), {"bits": 9}, r"9 must lie in \[1, 8\]"),
        (("pqcache",), {"parts": 0}, "0 must be 1 or more"),
        (("streaming_llm",), {"turn": True, "read": "pqcache"}, "counts positions in the cache"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.cache(model, *arguments, **options):
            pass
    keys = drawn(1, 1, 9, 8)
    with pytest.raises(InvalidInput, match="heads of 8 numbers cannot be cut into 3 parts"):
        sparity.score_cache(keys, keys, keys, policy="pqcache", parts=3)
    with sparity.cache(model, "pqcache", parts=3), pytest.raises(InvalidInput, match="cannot be cut into 3 parts"):
        model(torch.arange(3, 30)[None])
