"""The laws of a cache with a policy, in whole models: the whole cache's bits, and dense attention under its mask."""

import pytest
import torch
from learned import learned_of
from transformers import GptOssConfig

import sparity
from families import build, tiny_configs
from masked_dense import called, calls_of, masked_logits, recording
from sparity import registry
from sparity.dynamic.cache.in_place import pages_of
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.engine.kernels.attention.cpu import Chosen

NAMES = registry.names("cache.policy")
LEARNING = [name for name in NAMES if registry.get("cache.policy", name).reads_text] + ["kvzip"]
SMALL = {
    "snapkv": {"window": 4},
    "pyramidkv": {"window": 4},
    "adakv": {"window": 4},
    "criticalkv": {"window": 4},
    "defensivekv": {"window": 4},
    "lagkv": {"lag": 4},
    "quest": {"page": 4, "pages": 1, "dense": 1},
    "kivi": {"bits": 4, "group": 4, "residual": 64},
    "minicache": {"retain": 1.0},
    "razorattention": {"window": 6, "compensate": False},
    "expected_attention": {"future": 8},
    "kvzip": {"sinks": 2},
    "kvzap": {"window": 4},
    "duoattention": {"sinks": 2, "window": 6},
    "triattention": {"window": 4},
    "pqcache": {"bits": 2},
}
SIZES = (24, 10, 1, 1, 1, 5, 1)  # a prompt, a second piece, decoding, a short second turn, decoding
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox", "gpt2", "gpt_oss")


@pytest.fixture(scope="module")
def models():
    configs = tiny_configs()
    configs["mistral"].sliding_window = None
    configs["gpt_oss"] = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=8, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return {name: build(configs[name]) for name in FAMILIES}


def choosing_at_once(name):
    """Whether a policy keeps as many tokens as it is asked for, by what it sees of a layer and all its prompt."""
    found = registry.get("cache.policy", name)
    return found.counts and found.drops and not found.rereads and not found.narrows


def with_policy(model, name, keep=0.4, **options):
    own, fields = SMALL.get(name, {}), registry.get("cache.policy", name).__dataclass_fields__
    given = {key: value for key, value in options.items() if key in fields and key not in ("sinks", "recent")}
    rest = {key: value for key, value in options.items() if key not in given}
    more = {"sinks": 2, "recent": 2, **learned_of(model, name), **rest}
    return sparity.cache(model, {name: {**own, **given}}, keep, **more)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_the_whole_text_gives_the_bits_of_the_whole_cache(name, models):
    model = models["llama"]
    for pads in ((0, 0), (0, 5)):
        calls = calls_of(pads, *SIZES)
        dense = called(model, calls)
        keep, options = (1.0, {}) if name != "drop_all" else (0.5, {"sinks": 99})
        with with_policy(model, name, keep, **options):
            found = called(model, calls)
        assert all(torch.equal(*pair) for pair in zip(found, dense, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_the_whole_text_gives_the_bits_of_the_whole_cache_in_every_family(family, models):
    model, calls = models[family], calls_of((0, 3), *SIZES)
    dense = called(model, calls)
    for name in ("snapkv", "h2o"):
        with with_policy(model, name, 64):
            found = called(model, calls)
        assert all(torch.equal(*pair) for pair in zip(found, dense, strict=True))


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("keep_all", "quest", "pqcache", "kivi", "minicache", "lazyllm")]
)
@pytest.mark.parametrize("pads", [(0,), (0, 0), (0, 7)])
def test_what_was_evicted_counts_as_if_it_were_masked(name, pads, models, monkeypatch):
    check_masked(models["llama"], name, pads, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["adakv", "h2o"])
def test_what_was_evicted_counts_as_if_it_were_masked_in_every_family(family, name, models, monkeypatch):
    check_masked(models[family], name, (0, 7), monkeypatch)


@pytest.mark.parametrize(
    ("name", "family"),
    [("kvzip", "opt"), ("kvzap", "opt"), *((name, family) for name in LEARNING for family in ("gemma2", "gpt_neox"))],
)
def test_what_was_evicted_by_what_was_learned_counts_as_if_it_were_masked(name, family, models, monkeypatch):
    check_masked(models[family], name, (0, 7), monkeypatch)


def check_masked(model, name, pads, monkeypatch):
    calls = calls_of(pads, *SIZES)
    with recording(monkeypatch) as seen, with_policy(model, name):
        found = called(model, calls)
    expected, dense = masked_logits(model, calls, seen), called(model, calls)
    real = [call["attention_mask"][:, -call["input_ids"].shape[1] :].bool() for call in calls]
    kind = registry.get("cache.policy", name)
    if kind.narrows:
        real[0][:, :-1] = False  # dropped tokens are read no further
    for here, there, rows in zip(found, expected, real, strict=True):
        assert torch.allclose(here[rows], there[rows], atol=2e-5 * float(there.abs().max()))
    assert not torch.allclose(found[-1], dense[-1], atol=1e-3)
    held = max(len(places) for _, rows in seen for row in rows for places in row)
    assert held <= 24 + 10 + 3 + 5 or "retrieval" in kind.learns or kind.narrows  # whole heads, the first layers


def test_quest_reads_the_pages_it_chose_and_holds_everything(models, monkeypatch):
    model, calls = models["llama"], calls_of((0, 0), 33, 1, 1)
    with with_policy(model, "quest"):
        past = model(**calls[0]).past_key_values
        found = model(**calls[1], past_key_values=past).logits
    assert [int(layer.store.lengths[0]) for layer in past.layers] == [34] * 3
    whole, queries = called(model, calls[:2])[1], []
    assert not torch.allclose(found, whole, atol=1e-3)
    # with every page asked for the bits are those of the whole cache
    with with_policy(model, "quest", pages=9):
        assert torch.equal(called(model, calls[:2])[1], whole)
    # what is read is what `select_cache` chooses for the last query
    attend = PolicyLayer.chosen

    def spied(self, query, *more):
        pages = attend(self, query, *more)
        if pages is not None:
            keys, values = self.store.views()[:2]
            queries.append((pages, query.clone(), keys.clone(), values.clone()))
        return pages

    monkeypatch.setattr(PolicyLayer, "chosen", spied)
    with with_policy(model, "quest"):
        called(model, calls)
    assert len(queries) == 2 * 2  # two layers are not dense, two tokens were decoded
    for pages, query, keys, values in queries:
        expected = sparity.select_cache(
            query, keys, values, policy="quest", keep=0.4, page=4, pages=1, sinks=2, recent=2
        )
        chosen = torch.stack(pages_of(pages)).view(2, 2, -1) if isinstance(pages, Chosen) else pages
        mask = torch.zeros(2, 2, 9, dtype=torch.bool).scatter_(2, chosen, True).repeat_interleave(4, 2)
        assert torch.equal(mask[..., : keys.shape[2]], expected)


@pytest.mark.parametrize("name", [name for name in NAMES if choosing_at_once(name)])
def test_a_prompt_leaves_what_select_cache_keeps(name, models):
    model, calls = models["llama"], calls_of((0, 0), 30)
    seen, dense = {}, called(model, calls)
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda module, args, named: seen.update({module.layer_idx: (module, named)}), with_kwargs=True
        )
        for block in model.model.layers
    ]
    with with_policy(model, name):
        output = model(**calls[0])
    for hook in hooks:
        hook.remove()
    assert torch.equal(output.logits, dense[0])
    for index, layer in enumerate(output.past_key_values.layers):
        module, named = seen[index]
        states = states_of(module, named)
        budget = layer.run.budget(index, 30)
        first, last = layer.run.protected(budget)
        extra = {}
        if name == "criticalkv":
            extra["output_weight"] = module.o_proj.weight.T.reshape(4, 8, 32)
        if "hidden" in layer.run.policy.told:
            extra["hidden"] = named["hidden_states"].detach()
        extra |= layer.run.learned[index]
        fields = registry.get("cache.policy", name).__dataclass_fields__
        extra |= {key: count for key, count in (("sinks", first), ("recent", last)) if key not in fields or count}
        own = SMALL.get(name, {})
        expected = sparity.select_cache(*states, policy=name, keep=budget, **{**own, **extra})
        for row in range(2):
            for head in range(2):
                assert layer.store.segment(row, head)[2].tolist() == expected[row, head].nonzero().flatten().tolist()


def states_of(module, named):
    """Queries, keys and values after rotary of a Llama attention module's call."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden = named["hidden_states"]
    shape = (*hidden.shape[:-1], -1, module.head_dim)
    queries, keys, values = (
        projection(hidden).view(shape).transpose(1, 2) for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    cosine, sine = named["position_embeddings"]
    return [x.detach() for x in (*apply_rotary_pos_emb(queries, keys, cosine, sine), values)]


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_is_the_row_alone(name, models):
    model, calls = models["llama"], calls_of((0, 7), *SIZES)
    with with_policy(model, name):
        both = called(model, calls)
        alone = called(
            model,
            [{"input_ids": calls[0]["input_ids"][1:, 7:]}, *({"input_ids": c["input_ids"][1:]} for c in calls[1:])],
        )
    for together, single in zip(both[1:], alone[1:], strict=True):
        assert torch.allclose(together[1:], single, atol=2e-5 * float(single.abs().max()))
