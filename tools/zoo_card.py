"""The model card of a model of the zoo, from the facts of its training and what was measured on it."""

from typing import Any

from transformers import PretrainedConfig

from zoo_data import MIX
from zoo_probes import Figures

HEAD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [sparity, sparse, small]
---
"""
SHAPES = {
    "llama": "Llama: SwiGLU, RMSNorm, rotary positions, grouped-query attention",
    "opt": "OPT: learned positions, LayerNorm, ReLU",
    "mixtral": "Mixtral: eight experts, two of them for a token, RMSNorm, rotary positions, grouped-query attention",
}
DATA = """## Data and licences

The weights may be used under Apache-2.0. The training texts keep their licences:

| domain | sources | licence |
|---|---|---|
| books | classic books, header year up to 1927 (mlschmitt/classic-books-markdown) | public domain |
| web | PowerShell and C++ documentation, OpenStax textbooks | CC BY 4.0 |
| | Dive into Deep Learning | CC BY-SA 4.0 |
| | Ethereum and Python enhancement proposals, speeches of US presidents (NLTK) | CC0, public domain |
| | the Rust book and RFCs; Swift evolution proposals | MIT or Apache-2.0; Apache-2.0 |
| code | NetworkX, SciPy, SymPy | BSD-3-Clause |
| | SQLAlchemy, Twisted, TheAlgorithms/Python | MIT |
| math | OpenStax textbooks | CC BY 4.0 |
| | GSM8K (train), MAWPS; AQuA (dev) | MIT; Apache-2.0 |

Known overlap with evaluation sets: **GSM8K train, MAWPS and AQuA dev are training text**, so none of these judges
the model. GSM8K test and SVAMP are not in it. Shares of 13-word windows of the test texts that also occur in the same
domain's training text: books 0.000, web 0.012, code 0.069, math 0.066.
"""


def card(facts: dict[str, Any], figures: Figures, config: PretrainedConfig) -> str:
    """The card, in Markdown with front matter. `facts` is what `training.json` holds."""
    name = facts["model"]
    sections = [
        f"# zoo:{name}",
        f"A small model trained for Sparity: {SHAPES[config.model_type]}. {_numbers(figures, config)}",
        _training(facts),
        _quality(figures),
        _insides(figures),
        _again(facts),
        DATA.strip(),
        f"## What larger training would still bring\n\n{_lacks(facts, figures)}",
    ]
    return HEAD + "\n" + "\n\n".join(filter(None, sections)) + "\n"


def _numbers(figures: Figures, config: PretrainedConfig) -> str:
    inner = getattr(config, "intermediate_size", None) or config.ffn_dim
    shared = getattr(config, "num_key_value_heads", config.num_attention_heads)
    active = f", {figures.active:,} of them active for a token" if figures.active < figures.parameters else ""
    return (
        f"{figures.parameters:,} parameters{active}, bf16; {config.num_hidden_layers} blocks, "
        f"hidden {config.hidden_size}, MLP {inner}, {config.num_attention_heads} heads, {shared} key-value heads, "
        f"vocabulary {config.vocab_size} (tied), context {config.max_position_embeddings} by configuration."
    )


def _training(facts: dict[str, Any]) -> str:
    recall = facts["recall"]
    shares = ", ".join(f"{domain} {share * (1 - recall):.0%}" for domain, share in MIX.items())
    kept = {
        "moe": "all but the MLPs is a copy, and each expert got some of their neurons.",
        "relu": "the embeddings and the norm before the head are copies, the rest was drawn at random.",
    }
    origin = "It began from random weights."
    if facts["started_from"]:
        origin = f"It began from zoo:{facts['started_from']}, so the two are kin: {kept[facts['model']]}"
    return (
        f"## Training\n\n{origin} Then {facts['tokens']:,} tokens in {facts['steps']:,} steps, the rate "
        f"falling linearly in the last {facts['decay_steps']:,}. Mix: {shares}, recall {recall:.0%} "
        "(segments of text or of random words that come again; pass keys told inside text and asked for later). "
        "Muon for matrices, AdamW for the rest, bf16 autocast."
    )


def _quality(figures: Figures) -> str:
    perplexity = "\n".join(f"| {domain} | {value:.2f} |" for domain, value in figures.perplexity.items())
    copied = "\n".join(
        f"| copy of {distance} random tokens | {share:.1%} |" for distance, share in figures.copied.items()
    )
    keys = "\n".join(f"| pass key, {distance} tokens later | {share:.1%} |" for distance, share in figures.keys.items())
    return (
        "## Quality\n\nPerplexity on the first 200 windows of 512 tokens of each test split, in float32:\n\n"
        f"| domain | perplexity |\n|---|---|\n{perplexity}\n\nRecall by distance, by the likeliest token: tokens of a "
        f"repeated random segment; whole five-digit pass keys.\n\n| task | right |\n|---|---|\n{copied}\n{keys}"
    )


def _insides(figures: Figures) -> str:
    if figures.zeros:
        rows = "\n".join(f"| {layer} | {share:.1%} |" for layer, share in enumerate(figures.zeros))
        head = "| layer | zeros |\n|---|---|"
        return f"## Sparsity of activations\n\nZeros in what enters `fc2`, on test text:\n\n{head}\n{rows}"
    if figures.load:
        experts = range(len(figures.load[0]))
        head = "| layer |" + "".join(f" {expert} |" for expert in experts) + "\n|---" + "|---" * len(experts) + "|"
        rows = "\n".join(
            f"| {layer} | " + " | ".join(f"{x:.1%}" for x in load) + " |" for layer, load in enumerate(figures.load)
        )
        even = 1 / len(experts)
        said = f"Share of the router's choices, on test text (even: {even:.1%}):"
        return f"## Use of the experts\n\n{said}\n\n{head}\n{rows}"
    return ""


def _again(facts: dict[str, Any]) -> str:
    both = "--corpus ../shared/corpus --tokenizer ../shared/tokenizer-8k"
    command = f"python tools/train_zoo.py {facts['model']} {both} --size {facts['size']}"
    return (
        "## Again\n\n```bash\n"
        f"{command} --steps {facts['steps']} --decay-steps {facts['decay_steps']} --seed {facts['seed']}\n"
        f"{command} --report   # measures it and writes this card\n```\n\n"
        f"Trained with torch {facts['torch']}, transformers {facts['transformers']}, {facts['threads']} thread(s), "
        f"{facts['cpu']}, GPU: {facts['gpu']}; {facts['cpu_seconds']:,.0f} seconds of CPU time."
        + (f" {facts['note']}" if "note" in facts else "")
    )


def _lacks(facts: dict[str, Any], figures: Figures) -> str:
    ratio = facts["tokens"] / figures.parameters
    lacks = [
        f"It saw {ratio:.1f} tokens per parameter; about 20 are usual for a given amount of arithmetic, and small "
        "models gain far beyond that. It ranks methods and gives real activations; it does not write good text."
    ]
    if facts["size"] != "gpu":
        lacks.append(
            "It never saw more than 512 tokens at once: nothing about longer contexts can be judged on it. "
            "`--size gpu` trains a last phase at 2048."
        )
    recalls = {"copy": figures.copied, "recall pass keys": figures.keys}
    fails = [what for what, shares in recalls.items() if max(shares.values()) < 0.5]
    if fails:
        lacks.append(f"It does not {' or '.join(fails)}.")
    if figures.zeros:
        lacks.append("Its zeros are those of a model early in training; with more tokens they may lie elsewhere.")
    if figures.load:
        lacks.append("Its experts have had little time to differ.")
    return " ".join(lacks)
