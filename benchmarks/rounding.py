"""Which rounds nearer to float32, a model on the engine or in transformers, in every mode of generation.

    python benchmarks/rounding.py [--model zoo:llama] [--texts 8] [--tokens 24] [--form dense] [--out FILE]

One model three times: in bfloat16 on the engine, in bfloat16 in transformers, and with the same weights in float32, all
with no memory of another text. Two questions for each rotary scaling:

- `errors`: all three are given the same text, token by token behind a prompt. The root mean square of the difference
  of the logits from float32, engine / transformers: median, lowest and highest over the texts. Under 1 the engine is
  nearer.
- `equal`: all three generate. How many new tokens are those of float32, of the engine's and of transformers'. A token
  that differs changes those behind it, so these numbers say more about the model than about rounding.
"""

import argparse
import copy
from itertools import chain, pairwise
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer

import sparity
from results import save
from sparity import zoo
from sparity.calibration.bundled import bundled_documents
from sparity.engine.decoding.rotary import forget
from sparity.measure.data.machine import describe

LEARNED = 32  # tokens: the length that scalings start from, so that the texts go beyond it
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LEARNED}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LEARNED},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **BANDS},
}
PADDED = (0, 5, 11, 14)  # tokens of padding in front of each row of a batch
ALONE = ("greedy", "prompt lookup")  # a row at a time
MODES = {
    "greedy": {},
    "batch": {},
    "left padding": {},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
}


def models(name, scaling, form):
    """The same weights on the engine, in transformers, and in float32."""
    plain = sparity.load(name, dtype="bfloat16")
    config = plain.config
    if scaling != "default":
        config.max_position_embeddings = LEARNED
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **SCALINGS[scaling]}
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config)
    exact = copy.deepcopy(plain)
    for parameter in exact.parameters():
        parameter.data = parameter.data.float()
    return {"engine": sparity.attach(copy.deepcopy(plain), form=form), "transformers": plain, "float32": exact}


def padded(ids):
    """Rows `[rows, tokens]` with padding in front of each, and their mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, count in enumerate(PADDED[: len(ids)]):
        ids[row, :count] = mask[row, :count] = 0
    return ids, mask


def forced(model, ids, mask, prompt):
    """Float32 logits `[rows, tokens - prompt, vocabulary]` of a text that is given token by token behind a prompt."""
    forget(model.model.rotary_emb)
    positions, cache, found = (mask.cumsum(1) - 1).clamp(min=0), None, []
    edges = [0, *range(prompt, ids.shape[1] + 1)]
    with torch.no_grad():
        for first, last in pairwise(edges):
            seen = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            output = model(ids[:, first:last], past_key_values=cache, use_cache=True, logits_to_keep=1, **seen)
            cache = output.past_key_values
            found.append(output.logits[:, -1].float())
    return torch.stack(found, 1)


def generated(model, mode, ids, mask, tokens):
    """The new tokens `[rows, tokens]`."""
    rows = range(len(ids)) if mode in ALONE else [slice(None)]
    found = []
    for row in rows:
        forget(model.model.rotary_emb)
        inputs = ids[row].reshape(-1, ids.shape[1])
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        out = model.generate(inputs, attention_mask=mask[row].reshape(inputs.shape), **options, **MODES[mode])
        found.append(out[:, ids.shape[1] :])
    return torch.cat(found)


def errors(subjects, ids, mask, prompt):
    """The root mean square error of each text's logits, of the engine and of transformers."""
    logits = {name: forced(model, ids, mask, prompt) for name, model in subjects.items()}
    return [
        [float((logits[name][row] - logits["float32"][row]).square().mean().sqrt()) for row in range(len(ids))]
        for name in ("engine", "transformers")
    ]


def spread(numbers):
    """Median, lowest and highest."""
    return {"median": round(median(numbers), 3), "low": round(min(numbers), 3), "high": round(max(numbers), 3)}


def study(subjects, texts, prompt, tokens):
    """What is found for one rotary scaling."""
    whole, batches = torch.ones_like(texts), texts.split(len(PADDED))
    calls = {
        "one row": [(row[None], mask[None]) for row, mask in zip(texts, whole, strict=True)],
        "left padding": [padded(batch) for batch in batches],
        "12 rows": [(batch.repeat(3, 1), torch.ones_like(batch.repeat(3, 1))) for batch in batches],
    }
    found = {"errors": {}, "equal": {}}
    for name, inputs in calls.items():
        ours, theirs = zip(*(errors(subjects, ids, mask, prompt) for ids, mask in inputs), strict=True)
        pairs = list(zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True))
        found["errors"][name] = {
            "engine / transformers": spread([a / b for a, b in pairs]),
            "transformers": spread([b for _, b in pairs]),
        }
    for mode in MODES:
        same = {"engine": 0, "transformers": 0}
        for batch in batches:
            ids, mask = padded(batch[:, :prompt]) if mode == "left padding" else (batch[:, :prompt], None)
            mask = torch.ones_like(ids) if mask is None else mask
            out = {name: generated(model, mode, ids, mask, tokens) for name, model in subjects.items()}
            for name in same:
                same[name] += int((out[name] == out["float32"]).sum())
        found["equal"][mode] = {**same, "of": len(texts) * tokens}
    return found


def main():
    """Measure and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:llama")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--form", default="dense")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = zoo.path(options.model.removeprefix(zoo.PREFIX)) if zoo.PREFIX in options.model else options.model
    tokenizer, length = AutoTokenizer.from_pretrained(folder), options.prompt + options.tokens
    ids = [tokenizer(text).input_ids for text in bundled_documents("python-docs:held-out")]
    texts = torch.tensor([found[:length] for found in ids if len(found) >= length][: options.texts])
    content = {
        "command": f"python benchmarks/rounding.py --model {options.model} --texts {options.texts} "
        f"--prompt {options.prompt} --tokens {options.tokens} --form {options.form}",
        "machine": describe(),
        "scalings": {
            name: study(models(options.model, name, options.form), texts, options.prompt, options.tokens)
            for name in SCALINGS
        },
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
