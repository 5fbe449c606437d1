"""The models of the zoo load in stock transformers, have the shapes that are stated, and have learned their domains."""

import tarfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparity
import zoo_data
import zoo_probes
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
    "relu": {"books": 66, "web": 43, "code": 26, "math": 31},  # 60.3, 39.4, 23.6, 27.8
    "moe": {"books": 61, "web": 43, "code": 28, "math": 30},  # 55.2, 38.8, 25.5, 27.5
}

# Shares of 64 random tokens that are foretold when they come again, and of 20 pass keys told 64 tokens before.
RECALL = {
    "relu": {"copies": 0.78, "pass keys": 0.85},  # 0.866, 0.95
    "moe": {"copies": 0.67, "pass keys": 0.85},  # 0.743, 1.0
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


@pytest.mark.parametrize("name", RECALL)
def test_what_was_read_before_is_found_again(name, held_out):
    model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path(name))
    text = torch.tensor(tokenizer(held_out["books"])["input_ids"])
    drawn, right = np.random.default_rng(0), 0
    people = zoo_data.with_numbers(drawn, drawn.choice(zoo_data.NAMES, size=20, replace=False))
    for place, (person, number) in enumerate(people):
        told = tokenizer(zoo_data.statement(person, number), return_tensors="pt")["input_ids"][0]
        asked = f"{zoo_data.question(person)} The pass key of {person} is"
        prompt = torch.cat([told, text[place * 64 :][:64], tokenizer(asked, return_tensors="pt")["input_ids"][0]])
        written = model.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        right += tokenizer.decode(written).startswith(f" {number}")
    reached = {"copies": zoo_probes.copied(model, 64, 16), "pass keys": right / len(people)}
    assert {what: share for what, share in reached.items() if share < RECALL[name][what]} == {}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_card_says_what_has_to_be_known(name):
    card = (zoo.path(name) / "README.md").read_text()
    for said in ("Apache-2.0", "GSM8K train", "MAWPS", "larger training", "tokens"):
        assert said in card
