"""Compiled attention over a cache gives what PyTorch's gives, for every store, mask and choice of pages."""

import pytest
import torch

import sparity
from sparity.dynamic.cache import attending
from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.in_place import attend_in_place, chosen_in_place, pages_of, takes
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.reading import pages_read
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.engine.kernels import native
from sparity.engine.kernels.attention import cpu

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
LENGTH, WIDTH = 70, 32
STORES = {
    "plain": Store,
    "weighed": lambda *states: Store(*states, weighed=True),
    "paged": lambda *states: PagedStore(*states, page=4),
    "8 bits": lambda *states: QuantisedStore(*states, 0, False, 8, 8, 9),
    "4 bits": lambda *states: QuantisedStore(*states, 0, False, 4, 16, 9),
    "2 bits": lambda *states: QuantisedStore(*states, 0, False, 2, 32, 9),
}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store_of(kind, ragged=True, dtype=torch.float32):
    """Two rows of two heads, quantised where it can be, after an eviction that heads differ in."""
    store = STORES[kind](random(2, 2, LENGTH, WIDTH, dtype=dtype), random(2, 2, LENGTH, WIDTH, seed=1, dtype=dtype))
    if isinstance(store, QuantisedStore):
        store.quantise(store.due(LENGTH), LENGTH)
    if ragged:
        store.keep([torch.arange(LENGTH) % (3 + pair) != 1 for pair in range(4)])
    if "weight" in getattr(store, "buffers", {}):
        store.buffers["weight"][::7] = 5.0
    return store


def by_torch(monkeypatch, call):
    """What PyTorch gives."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "declines", lambda *_: "not now")
        return call()


def masks(kind, new):
    """One of each shape that transformers makes."""
    padding = torch.arange(LENGTH) >= torch.tensor([[0], [11]])
    if kind == "padding":
        return padding.long()
    table = (torch.arange(LENGTH) <= torch.arange(LENGTH - new, LENGTH)[:, None]) & padding[:, None, None]
    if kind == "table":
        return table
    return torch.zeros(table.shape).masked_fill(~table, torch.finfo(torch.float32).min) if kind == "added" else None


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "table", "added"])
@pytest.mark.parametrize("kind", list(STORES))
def test_every_store_and_mask(kind, mask, ragged, monkeypatch):
    store = store_of(kind, ragged)
    for new, window in ((1, None), (1, 20), (3, None)):
        query, sight = random(2, 4, new, WIDTH, seed=2), Sight(masks(mask, new), 2, new, LENGTH, window)
        given = {"softcap": 3.0, "s_aux": random(4, seed=3)} if window else {}
        read = attend_in_place(query, store, sight, 0.2, **given)
        assert (read is None) == (new > 1 and mask in ("table", "added"))
        found = attend(query, store, sight, 0.2, **given)
        expected = by_torch(monkeypatch, lambda q=query, s=sight, g=given: attend(q, store, s, 0.2, **g))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(STORES))
def test_bfloat16(kind, monkeypatch):
    store, sight = store_of(kind, dtype=torch.bfloat16), Sight(None, 2, 1, LENGTH)
    query = random(2, 4, 1, WIDTH, seed=2, dtype=torch.bfloat16)
    found = attend(query, store, sight, 0.2)
    expected = by_torch(monkeypatch, lambda: attend(query, store, sight, 0.2))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("protected", [(0, 0), (5, 9), (1, 40)])
@pytest.mark.parametrize("budget", [3, 30, 200])
@pytest.mark.parametrize(
    ("kind", "by"), [("paged", "bound"), ("paged", "mean"), ("4 bits", "bound"), ("8 bits", "bound")]
)
@pytest.mark.parametrize("ragged", [False, True])
def test_pages_are_those_that_pytorch_chooses(kind, by, budget, protected, ragged, monkeypatch):
    store, query = store_of(kind, ragged), random(2, 4, 1, WIDTH, seed=6)
    for group in ("max", "mean"):
        page = {"paged": 4, "8 bits": 8, "4 bits": 16}[kind]
        reader = policy_of({"quest": {"page": page, "pages": 2, "by": by, "group": group}})
        budgets = [budget, budget + 4]
        chosen = chosen_in_place(store, reader, query, budgets, protected)
        found = pages_of(chosen)
        expected = by_torch(monkeypatch, lambda r=reader, b=budgets: pages_read(store, r, query, b, protected))
        assert [each.tolist() for each in found] == [each.tolist() for each in expected]
        read = attend(query, store, Sight(None, 2, 1, LENGTH), 0.2, chosen)
        parts = [store.segment(*divmod(pair, 2), pages) for pair, pages in enumerate(found)]
        for pair, (keys, values, _) in enumerate(parts):
            row, head = divmod(pair, 2)
            weights = (query[row, 2 * head : 2 * head + 2, 0] @ keys.T * 0.2).softmax(-1)
            assert torch.allclose(read[row, 0, 2 * head : 2 * head + 2], weights @ values, atol=1e-5)


def test_chosen_pages_are_read_by_pytorch_where_the_mask_says_more(monkeypatch):
    store, query = store_of("paged"), random(2, 4, 1, WIDTH, seed=6)
    reader = policy_of({"quest": {"page": 4, "pages": 2}})
    chosen = chosen_in_place(store, reader, query, [20, 20], (1, 1))
    plain = attend(query, store, Sight(None, 2, 1, LENGTH), 0.2, chosen)
    sight = Sight(torch.full((2, 1, 1, LENGTH), -2.5), 2, 1, LENGTH)  # the same is added to all logits
    assert attend_in_place(query, store, sight, 0.2, chosen) is None
    assert torch.allclose(attend(query, store, sight, 0.2, chosen), plain, atol=1e-5)


def test_what_pytorch_computes():
    store, query = store_of("plain"), random(2, 4, 1, WIDTH)
    assert takes(query, store)
    assert not takes(random(2, 4, 9, WIDTH), store)  # many tokens
    assert not takes(query.clone().requires_grad_(), store)
    assert not takes(query.half(), store_of("plain", dtype=torch.float16))
    assert not takes(query.bfloat16(), store)
    odd = Store(random(2, 2, 9, 12), random(2, 2, 9, 12))
    assert not takes(random(2, 4, 1, 12), odd)


@pytest.fixture(scope="module")
def llama():
    return sparity.load("zoo:llama").float()


def decoded(model, monkeypatch, **asked):
    """Logits of two tokens after a prompt, and how often the library attended to a layer that holds everything."""
    calls, ids = [], torch.arange(3, 90)[None]

    def counted(*arguments, **named):
        calls.append(arguments)
        return attend_in_place(*arguments, **named)

    monkeypatch.setattr(attending, "attend_in_place", counted)
    with torch.no_grad(), sparity.cache(model, **asked) as attached:
        past = attached(ids[:, :-2]).past_key_values
        calls.clear()
        found = [attached(token, past_key_values=past).logits for token in ids[:, -2:].split(1, 1)]
    return torch.stack(found), len(calls)


def test_exact_attention_is_the_models_own_and_the_other_rounds(llama, monkeypatch):
    layers = llama.config.num_hidden_layers
    exact, calls = decoded(llama, monkeypatch, policy="keep_all", keep=1.0)
    assert calls == 0
    rounded, calls = decoded(llama, monkeypatch, policy="keep_all", keep=1.0, exact=False)
    assert calls == 2 * layers
    assert torch.allclose(rounded, exact, atol=1e-4)
    everything, calls = decoded(llama, monkeypatch, policy={"quest": {"dense": 1}}, keep=1.0)
    assert calls == 0
    assert torch.equal(everything, exact)
    _, calls = decoded(llama, monkeypatch, policy={"quest": {"dense": 1}}, keep=0.7)
    assert calls == 2  # the first layer reads everything, and others do not
