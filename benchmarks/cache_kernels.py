"""Decoding with part of the cache, over transformers' default cache: attention alone, and a whole model; bytes as well.

    python benchmarks/cache_kernels.py [--out OUT.json] [--contexts 4096 16384] [--dtypes float32 bfloat16]
        [--shapes eight smollm2] [--rounds 9] [--tokens 2] [--threads N]

Weights, keys and values are random: no prompt is read, but each policy chooses from the keys, with random queries for
its window. All sides of a table take turns in one run, so that none finds its keys in a processor's cache; a figure is
the median over rounds, of the default's time in a round over the side's own, with the quartiles. `eight` has 8 blocks
of 1024, 16 query and 4 key and value heads of 64; `smollm2` the shape of SmolLM2-135M; attention alone has 32 and 8
heads of 128.
"""

import argparse
import copy
import statistics
import time
from contextlib import ExitStack

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import sparity
from results import save
from sparity.dynamic.cache.attaching import RUN
from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.converting import convert
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.policies.quest import Quest
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.reading import pages_read
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.measure.data.machine import describe

SHAPES = {
    "eight": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
              "num_key_value_heads": 4, "vocab_size": 8192},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
}  # fmt: skip
WINDOW = 64  # queries that a policy is shown
KIVI = {"kivi": {"bits": 4}}
SIDES = {
    "all, lossless": {"policy": "keep_all", "keep": 1.0, "exact": False},
    "snapkv, 25 %": {"policy": "snapkv", "keep": 0.25},
    "snapkv, 10 %": {"policy": "snapkv", "keep": 0.1},
    "adakv, 25 %, ragged": {"policy": "adakv", "keep": 0.25},
    "quest, 10 % read": {"policy": "quest", "keep": 0.1},
    "kivi, 4 bits": {"policy": {"kivi": {"bits": 4}}, "keep": 1.0},
    "snapkv, 20 %, 4 bits, quest": {
        "policy": "snapkv", "keep": 0.2, "store": KIVI, "read": {"quest": {"page": 32}}, "read_keep": 0.1,
    },
}  # fmt: skip


def ratios(sides, rounds, first):
    """What each side takes in ms, and how often it goes into the first's time: median and quartiles."""
    taken = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            if number:  # the first round warms up
                taken[name].append(1000 * (time.perf_counter() - begin))
    found = {}
    for name, own in taken.items():
        over = [a / b for a, b in zip(taken[first], own, strict=True)]
        lower, middle, upper = statistics.quantiles(over, n=4)
        found[name] = {"ms": statistics.median(own), "ratio": [middle, lower, upper]}
    return found


def attention_alone(context, dtype, rounds):
    """One token's attention in one layer, over that of transformers (SDPA with grouped heads)."""
    heads, kv_heads, width = 32, 8, 128
    keys, values = (torch.randn(1, kv_heads, context, width).to(dtype) for _ in range(2))
    query, scale, sight = torch.randn(1, heads, 1, width).to(dtype), width**-0.5, Sight(None, 1, 1, context)
    whole, paged = Store(keys, values), PagedStore(keys, values)
    ragged = Store(keys, values)
    chosen = torch.rand(kv_heads, context)
    ragged.keep([own < share for own, share in zip(chosen, torch.linspace(0.05, 0.15, kv_heads), strict=True)])
    coded = {}
    for bits in (8, 4):
        coded[bits] = QuantisedStore(keys, values, 0, False, bits, 32, 128)
        coded[bits].quantise(coded[bits].due(context), context)
    budget = [context // 10]

    def quest(store, page):
        reader = Quest(page=page)
        return attend(query, store, sight, scale, pages_read(store, reader, query, budget, (4, 16)))

    packed = query.view(1, kv_heads, -1, width)
    sides = {
        "SDPA, grouped": lambda: scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True),
        "SDPA, packed": lambda: scaled_dot_product_attention(packed, keys, values, scale=scale),
        "all": lambda: attend(query, whole, sight, scale),
        "10 % kept, ragged": lambda: attend(query, ragged, sight, scale),
        "quest, 10 % read": lambda: quest(paged, 16),
        "8 bits": lambda: attend(query, coded[8], sight, scale),
        "4 bits": lambda: attend(query, coded[4], sight, scale),
        "4 bits, quest, 10 % read": lambda: quest(coded[4], 32),
    }
    return ratios(sides, rounds, "SDPA, grouped")


def filled(model, context):
    """A cache of random keys and values, with the model's policy, if it has one, done with them as with a prompt."""
    config = model.config
    cache, run = DynamicCache(config=config), getattr(model, RUN, None)
    if run is not None:
        convert(cache, run, config.num_hidden_layers)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for index, block in enumerate(model.model.layers):
        keys, values = (torch.randn(shape).to(model.dtype) for _ in range(2))
        if run is None:
            cache.update(keys, values, index)
            continue
        layer = cache.layers[index]
        layer.update(keys, values)
        query = torch.randn(1, config.num_attention_heads, WINDOW, config.head_dim).to(model.dtype)
        layer.read(block.self_attn, query, Sight(None, 1, WINDOW, context), config.head_dim**-0.5, None)
    return cache


def bytes_of(cache):
    """Of all layers."""
    return sum(
        layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )


def whole_model(shape, context, dtype, rounds, tokens):
    """Decoding, by every side with the same weights, and the bytes of its cache over the default's."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2 * context)
    dense = LlamaForCausalLM(config).to(dtype).eval()
    models = {"default": dense}
    for name in SIDES:
        with torch.device("meta"):
            models[name] = LlamaForCausalLM(copy.deepcopy(config)).eval()
        models[name].load_state_dict(dense.state_dict(), assign=True)
        models[name].model.rotary_emb = dense.model.rotary_emb
    token = torch.tensor([[7]])
    with ExitStack() as open_policies:
        for name, asked in SIDES.items():
            open_policies.enter_context(sparity.cache(models[name], **asked))
        caches = {name: filled(model, context) for name, model in models.items()}
        sizes = {name: bytes_of(cache) for name, cache in caches.items()}

        def decode(name):
            for _ in range(tokens):
                models[name](input_ids=token, past_key_values=caches[name], logits_to_keep=1)

        found = ratios({name: lambda name=name: decode(name) for name in models}, rounds, "default")
    for name, each in found.items():
        each["ms"] /= tokens
        each["bytes"] = sizes[name] / sizes["default"]
    return found


def table(found):
    """As Markdown."""
    sized = any("bytes" in each for each in found.values())
    lines = [f"| | ms | over the first |{' bytes |' if sized else ''}", f"|---|---|---|{'---|' if sized else ''}"]
    for name, each in found.items():
        middle, least, most = each["ratio"]
        line = f"| {name} | {each['ms']:.2f} | {middle:.2f} ({least:.2f} to {most:.2f}) |"
        lines.append(line + (f" 1/{1 / each['bytes']:.1f} |" if sized else ""))
    return "\n".join(lines)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=9, help="of a model; attention alone takes three times as many")
    parser.add_argument("--tokens", type=int, default=2)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    content = {"options": vars(options), "machine": describe(), "threads": torch.get_num_threads(), "tables": {}}
    with torch.inference_mode():
        for dtype in options.dtypes:
            for context in options.contexts:
                kind = getattr(torch, dtype)
                title = f"attention alone, {dtype}, {context}"
                content["tables"][title] = attention_alone(context, kind, 3 * options.rounds)
                print(f"\n{title}\n\n{table(content['tables'][title])}", flush=True)
                for shape in options.shapes:
                    title = f"{shape}, {dtype}, {context}"
                    content["tables"][title] = whole_model(shape, context, kind, options.rounds, options.tokens)
                    print(f"\n{title}\n\n{table(content['tables'][title])}", flush=True)
    if options.out:
        save(content, options.out)


if __name__ == "__main__":
    main()
