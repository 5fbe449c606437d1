"""RazorAttention: which heads look far back, what the others keep, and the token that stands for what went."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import sparity
from masked_dense import called, calls_of
from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.heads import head_scores, highest_heads, paid_back, repeated_tokens, retrieval_heads
from sparity.dynamic.cache.seen import Seen
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.stage import CacheStage
from sparity.dynamic.cache.store import Store
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites

RAZOR = {"window": 12, "tokens": 16, "induction": 0.25}
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
FILE = "sparity-dynamic/00-cache.safetensors"


@pytest.fixture(scope="module")
def model(family_models):
    return copy.deepcopy(family_models["llama"])


def test_echo_and_induction_by_hand():
    period = 5
    words = torch.eye(period).repeat(3, 1)[None, None]  # 15 tokens, each word three times
    same, following = 100 * words, 100 * words.roll(-1, 2)
    seen = Seen(torch.cat([same, following], 1), words, words, 1.0)
    echo, induction = paid_back(seen, period).T.tolist()
    # the second time half of what is paid goes to the first copy, the third time two thirds to the first two
    assert echo == pytest.approx([(1 / 2 + 2 / 3) / 2, 0], abs=1e-6)
    assert induction == pytest.approx([0, 1], abs=1e-6)


def test_the_highest_shares_of_the_blocks_that_count():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.4], [0.8, 0.2, 0.7, 0.6], [0.99, 0.98, 0.97, 0.96]])
    counted = torch.tensor([True, True, False])
    assert highest_heads(scores, counted, 0.25).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
        [False] * 4,
    ]
    assert int(highest_heads(scores, counted, 0.01).sum()) == 1
    assert int(highest_heads(scores, counted, 0.0).sum()) == 0


def test_heads_of_a_trained_model_look_back_and_the_model_is_as_it_was():
    model = sparity.load("zoo:llama")
    policy = policy_of({"razorattention": {"tokens": 64}})
    echo, induction, groups = head_scores(Decoder.open(model), policy)
    assert echo.shape == induction.shape == (6, 6)
    assert groups == [2] * 6
    assert float(induction.max()) > 0.5 > 10 * float(induction.median())
    heads = retrieval_heads(Decoder.open(model), policy, [True] * 6)
    expected = torch.zeros(36, dtype=torch.bool)
    expected[induction.flatten().topk(5).indices] = True  # 14 % of 36
    expected[echo.flatten().argmax()] = True
    assert torch.equal(torch.stack(heads), expected.view(6, 3, 2).any(-1))
    assert model.config._attn_implementation == "sdpa"


def test_every_word_comes_as_often_and_no_more_than_fit(model):
    ids = repeated_tokens(model.config, policy_of({"razorattention": {"tokens": 9, "repeats": 3}}))
    assert ids.shape == (1, 27)
    assert len(set(ids[0, :9].tolist())) == 9
    assert torch.equal(ids[0, :9], ids[0, 18:])
    assert repeated_tokens(model.config, policy_of("razorattention")).shape[1] <= model.config.max_position_embeddings
    with pytest.raises(InvalidInput, match="show no head that looks back"):
        repeated_tokens(model.config, policy_of({"razorattention": {"repeats": 100}}))


def test_retrieval_heads_keep_everything_and_others_the_ends():
    states = [torch.randn(1, 3, 20, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    kept = sparity.select_cache(
        *states, policy="razorattention", keep=0.2, window=7, sinks=2, retrieval=torch.tensor([False, True, False])
    )
    assert bool(kept[0, 1].all())
    for head in (0, 2):
        assert kept[0, head].nonzero().flatten().tolist() == [0, 1, 15, 16, 17, 18, 19]
    with pytest.raises(InvalidInput, match=r"retrieval must be bool \[kv_heads\].*not bool \[3\]"):
        sparity.select_cache(*states, policy="razorattention", keep=0.2, retrieval=torch.tensor([True]))


def test_the_token_that_stands_for_others_gives_the_papers_formula():
    keys, values, query = (torch.randn(1, 1, 10, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    query = query[:, :, -1:]
    store = Store(keys, values, weighed=True)
    gone, stay = [2, 3, 4, 5], [0, 1, 6, 7, 8, 9]
    store.keep(store.merge([torch.tensor([i in stay for i in range(10)])], torch.ones(1, 10, dtype=torch.bool)))
    assert store.segment(0, 0)[2].tolist() == [0, 1, 5, 6, 7, 8, 9]

    def formula(dropped, kept):
        mean_key, mean_value = keys[0, 0, dropped].mean(0), values[0, 0, dropped].mean(0)
        many = len(dropped) * (query[0, 0, 0] @ mean_key * 0.5).exp()
        each = (keys[0, 0, kept] @ query[0, 0, 0] * 0.5).exp()
        return (many * mean_value + each @ values[0, 0, kept]) / (many + each.sum())

    sight = Sight(None, 1, 1, 10)
    assert torch.allclose(attend(query, store, sight, 0.5)[0, 0, 0], formula(gone, stay), atol=1e-6)
    # what goes later joins what went before, by numbers of tokens; padding is no token
    masks = [torch.tensor([True, True, False, False, False, True, True])]
    real = torch.ones(1, 10, dtype=torch.bool)
    store.keep(store.merge(masks, real))
    assert store.buffers["weight"][store.all()].tolist() == [1, 1, 6, 1, 1]
    assert torch.allclose(
        attend(query, store, sight, 0.5)[0, 0, 0], formula([2, 3, 4, 5, 6, 7], [0, 1, 8, 9]), atol=1e-6
    )
    padded = Store(keys, values, weighed=True)
    real[0, :3] = False
    assert padded.merge([torch.tensor([i > 6 for i in range(10)])], real)[0].nonzero().flatten().tolist() == [
        6,
        7,
        8,
        9,
    ]
    assert torch.allclose(padded.keys[6], keys[0, 0, 3:7].mean(0))


@torch.no_grad()
def test_a_prompt_leaves_the_ends_the_mean_and_the_whole_of_retrieval_heads(model):
    dense = model(IDS).past_key_values
    with sparity.cache(model, "razorattention", 0.2, sinks=2, recent=2, **RAZOR):
        past = model(IDS).past_key_values
    for layer, whole in zip(past.layers, dense.layers, strict=True):
        for head, retrieves in enumerate(layer.run.learned[layer.index]["retrieval"].tolist()):
            keys, values, places = layer.store.segment(1, head)
            kept = list(range(40)) if retrieves else [0, 1, 2, 3, 31, *range(32, 40)]
            assert places.tolist() == kept
            if not retrieves:
                assert torch.allclose(keys[4], whole.keys[1, head, 4:32].mean(0), atol=1e-5)
                assert torch.allclose(values[4], whole.values[1, head, 4:32].mean(0), atol=1e-5)
    assert sum(int(each["retrieval"].sum()) for each in past.layers[0].run.learned) in (
        3,
        4,
    )  # 25 % of 12 query heads, and an echo


def test_padded_rows_and_beams_go_on_as_themselves(model):
    calls = calls_of((0, 7), 30, 1, 1, 3, 1)
    with sparity.cache(model, "razorattention", 0.2, sinks=2, recent=2, **RAZOR):
        both = called(model, calls)
        alone = [{"input_ids": call["input_ids"][1:]} for call in calls]
        alone[0] = {"input_ids": calls[0]["input_ids"][1:, 7:]}
        for together, single in zip(both[1:], called(model, alone)[1:], strict=True):
            assert torch.allclose(together[1:], single, atol=2e-5 * float(single.abs().max()))
        assert not torch.allclose(both[-1], called(model, calls_of((0, 0), 30, 1, 1, 3, 1))[-1], atol=1e-3)
        answer = model.generate(IDS, num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert answer.shape == (2, 44)


@torch.no_grad()
def test_the_heads_are_saved_with_the_model_and_refused_for_another(family_models, tmp_path):
    model = family_models["llama"]
    options = {"policy": {"razorattention": RAZOR}, "keep": 0.2, "sinks": 2, "recent": 2}
    recipe = {"stages": [{"cache": options}], "measure": {"speed": None}}
    path = sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu").path
    past = sparity.load(path)(IDS).past_key_values
    with sparity.cache(model, options["policy"], 0.2, sinks=2, recent=2):
        expected = model(IDS).past_key_values
    assert [x.store.lengths.tolist() for x in past.layers] == [x.store.lengths.tolist() for x in expected.layers]
    data, stage = load_file(path / FILE), CacheStage.model_validate(options)
    name = "model.layers.1.self_attn.k_proj.retrieval"
    for changed, words in (
        ({key: tensor for key, tensor in data.items() if key != name}, f"{name} is missing"),
        ({**data, name: torch.ones(5, dtype=torch.bool)}, r"not bool \[2\]: of another model"),
        ({**data, name: torch.ones(2)}, "is torch.float32"),
        ({**data, "model.layers.9.self_attn.k_proj.keep": data["model.layers.1.self_attn.k_proj.keep"]}, "the unknown"),
    ):
        with pytest.raises(CorruptFile, match=words), stage.attach(model, input_sites(model), changed):
            pass


def test_what_is_merged_is_neither_quantised_nor_left_unread(model):
    for more in ({"store": "kivi"}, {"read": "quest"}):
        with pytest.raises(InvalidInput, match="give compensate=False"), sparity.cache(model, "razorattention", **more):
            pass
        options = {"compensate": False, **RAZOR}
        with torch.no_grad(), sparity.cache(model, "razorattention", **more, **options):
            assert called(model, calls_of((0,), 30, 1))[1].isfinite().all()
