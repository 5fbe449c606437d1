import math

import pytest
import torch

import sparity
from sparity.errors import InvalidInput
from sparity.quality.agreement import compare, grade


def reference(model, ids, window):
    """The loop of SparseGPT's and Wanda's evaluation code."""
    count = len(ids) // window
    total = 0.0
    for i in range(count):
        part = ids[None, i * window : (i + 1) * window]
        with torch.no_grad():
            logits = model(part).logits
        loss = torch.nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1))
        total += float(loss) * window
    return math.exp(total / (count * window))


@pytest.mark.parametrize("length", [32, 100, 127])
def test_equal_to_the_papers_protocol(family_models, length):
    model = family_models["llama"]
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length))
    assert sparity.perplexity(model, ids, window=32) == pytest.approx(reference(model, ids, 32), rel=1e-5)
    assert sparity.perplexity(model, ids.tolist(), window=32) == sparity.perplexity(model, ids, window=32)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(family_models):
    import copy

    model = copy.deepcopy(family_models["llama"])
    torch.nn.init.zeros_(model.lm_head.weight)
    assert sparity.perplexity(model, torch.arange(64), window=32) == pytest.approx(97, rel=1e-5)


def test_a_real_model_predicts_its_stories(stories_model, stories):
    """The model's card gives 0.7953 nats per token over 204,800 tokens; these are the first 12,800."""
    from transformers import AutoTokenizer

    model, tokenizer = sparity.load(stories_model), AutoTokenizer.from_pretrained(stories_model)
    ids = torch.tensor([token for story in stories["held_out"][:20] for token in tokenizer(story)["input_ids"]])
    ids = ids[: 50 * 256]
    found = sparity.perplexity(model, ids, window=256)
    assert found == pytest.approx(reference(model, ids, 256), rel=1e-5)
    assert 0.5 < math.log(found) < 0.9


def test_errors(family_models):
    model = family_models["llama"]
    ids = torch.arange(64)
    for bad, window, words in (
        (ids[:10], 32, "the text has 10 tokens, less than one window of 32"),
        (ids, 65, "at most the model's context of 64"),
        (ids, 1, "at least 2"),
        (ids.reshape(2, 32), 32, "1-D integers"),
        (ids.float(), 32, "1-D integers"),
        (ids + 40, 32, "vocabulary has 97"),
        (ids - 1, 32, "from -1"),
    ):
        with pytest.raises(InvalidInput) as caught:
            sparity.perplexity(model, bad, window)
        assert words in str(caught.value)


def test_a_model_agrees_with_itself_and_less_with_another(family_models):
    ids = torch.arange(96)
    same = compare(family_models["llama"], family_models["llama"], ids, 32)
    assert (same.kl, same.top1, same.tokens) == (0.0, 1.0, 93)
    assert (
        same.perplexity == same.dense_perplexity == pytest.approx(sparity.perplexity(family_models["llama"], ids, 32))
    )
    other = compare(family_models["llama"], family_models["qwen2"], ids, 32)
    assert other.kl > 0.1
    assert other.top1 < 0.5


def test_kl_by_hand(family_models):
    class Fixed:
        config = family_models["llama"].config

        def __init__(self, logits):
            self.logits = torch.tensor(logits)

        def parameters(self):
            return iter([self.logits])

        def __call__(self, input_ids, use_cache):
            return type("Output", (), {"logits": self.logits.expand(1, input_ids.shape[1], -1)})

    probabilities = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    found = compare(*(Fixed(p.log().tolist()) for p in probabilities), torch.zeros(4, dtype=torch.long), 4)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.dense_perplexity == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (-0.1, "excellent"),
        (0.0099, "excellent"),
        (0.01, "good"),
        (0.05, "acceptable"),
        (0.1, "poor"),
        (math.inf, "poor"),
    ],
)
def test_grades(change, word):
    assert grade(change) == word
