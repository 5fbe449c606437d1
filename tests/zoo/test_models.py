"""The models of the zoo load in stock transformers, have the shapes that are stated, and have learned their domains."""

import tarfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparity
from sparity import zoo

SHAPES = {
    "llama": {"hidden_size": 192, "num_hidden_layers": 6, "num_key_value_heads": 3, "intermediate_size": 512},
    "relu": {"hidden_size": 192, "num_hidden_layers": 6, "ffn_dim": 768, "activation_function": "relu"},
    "moe": {"hidden_size": 192, "num_hidden_layers": 6, "num_local_experts": 8, "num_experts_per_tok": 2},
}
PARAMETERS = {"llama": 4_008_384, "relu": 4_341_120, "moe": 5_787_072}
WINDOWS = 4  # of 512 tokens
# Measured on these windows, and a margin of a tenth.
BOUNDS = {
    "llama": {"books": 67, "web": 56, "code": 36, "math": 41},  # 60.9, 50.7, 32.9, 37.5
    "relu": {"books": 105, "web": 136, "code": 135, "math": 127},  # 95.5, 123.6, 122.6, 115.8
    "moe": {"books": 82, "web": 78, "code": 57, "math": 57},  # 75.0, 71.0, 51.9, 52.2
}


@pytest.fixture(scope="module")
def held_out(assets):
    """The beginning of each domain's test split."""
    texts = {}
    for domain in BOUNDS["llama"]:
        with tarfile.open(assets / "corpus" / f"{domain}.tar.xz") as archive:
            texts[domain] = archive.extractfile(f"{domain}/test.txt").read(40_000).decode(errors="ignore")
    return texts


@pytest.mark.parametrize("name", zoo.MODELS)
def test_stock_transformers_loads_every_weight_in_the_stated_shape(name):
    model, report = AutoModelForCausalLM.from_pretrained(zoo.path(name), output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {key: getattr(model.config, key) for key in SHAPES[name]} == SHAPES[name]
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    asked = tokenizer("The king", return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > asked["input_ids"].shape[1]
    assert tokenizer.decode(written[0]).startswith("The king")


@pytest.mark.parametrize("name", zoo.MODELS)
def test_perplexity_of_every_domain_is_under_its_bound(name, held_out):
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    reached = {
        domain: sparity.perplexity(model, tokenizer(text)["input_ids"][: WINDOWS * 512], 512)
        for domain, text in held_out.items()
    }
    assert {domain: value for domain, value in reached.items() if value > BOUNDS[name][domain]} == {}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_card_says_what_has_to_be_known(name):
    card = (zoo.path(name) / "README.md").read_text()
    for said in ("Apache-2.0", "GSM8K train", "MAWPS", "larger training", "tokens"):
        assert said in card
