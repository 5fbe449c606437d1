"""Folders as compressed-tensors up to 0.14 wrote them, bit by bit from the layout that docs/format.md describes."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from sparity.checkpoints.source import CheckpointSource

TWO_OF_FOUR = "sparse-24-bitmask"


def parts(weight, layout):
    """The tensors that stand for a weight, by their last names."""
    rows = weight.reshape(-1, weight.shape[-1]).tolist()
    bytes_per_row = -(-weight.shape[-1] // 8)
    masks, values, offsets = [], [], []
    for row in rows:
        places = _two_of_four(row) if layout == TWO_OF_FOUR else [place for place, x in enumerate(row) if x != 0]
        offsets.append(len(values))
        values += [row[place] for place in places]
        masks.append([sum(1 << place % 8 for place in places if place // 8 == byte) for byte in range(bytes_per_row)])
    found = {
        "shape": torch.tensor(weight.shape),
        "compressed": torch.tensor(values, dtype=weight.dtype),
        "bitmask": torch.tensor(masks, dtype=torch.uint8).reshape(*weight.shape[:-1], bytes_per_row),
    }
    if layout == TWO_OF_FOUR:
        found["shape"] = found["shape"].reshape(2, 1)
        found["compressed"] = found["compressed"].reshape(len(rows), -1)
    else:
        found["row_offsets"] = torch.tensor(offsets).reshape(weight.shape[:-1])
    return found


def _two_of_four(row):
    """The places of the two largest of every four; ties are settled by place, which any reader must bear."""
    fours = [range(first, first + 4) for first in range(0, len(row), 4)]
    return [place for four in fours for place in sorted(sorted(four, key=lambda place: -abs(row[place]))[:2])]


def orphan(plain, folder, layout, names=None, early=False, shards=1):
    """A copy of a plain folder in an orphaned layout; `names`: the weights that are compressed, by default those of
    linear layers in blocks. `early`: as before 0.9.
    """
    shutil.copytree(plain, folder)
    (folder / "model.safetensors").unlink()
    stored = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        chosen = "proj" in name if names is None else name in names
        prefix = name if early else name.removesuffix(".weight")
        stored |= {f"{prefix}.{part}": x for part, x in parts(tensor, layout).items()} if chosen else {name: tensor}
    homes = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(stored)}
    for shard in sorted(set(homes.values())):
        save_file({name: x for name, x in stored.items() if homes[name] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    say(folder, key="compression_config" if early else "quantization_config", format=layout)
    return folder


def say(folder, key="quantization_config", sparsity=True, format="sparse-bitmask", **more):
    """What config.json says about the compression."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    about = {"format": format, "global_sparsity": 0.5, "ignore": ["lm_head"], "targets": ["Linear"]}
    config[key] = {"quant_method": "compressed-tensors", "version": "0.9.4", **more}
    if sparsity:
        config[key]["sparsity_config"] = about
    path.write_text(json.dumps(config))


def read(folder):
    source = CheckpointSource(folder)
    return source.read(list(source.shapes()))
