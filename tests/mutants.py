"""Damaged packed files in numbers: `python mutants.py files|folder PATH SEED COUNT`, in a process that may die.

Each file is either refused by an error of Sparity, or gives matrices that pass their check and multiply as their dense
weights do. Half of the damage is blind; the other half knows the structure and makes every hash good again.
"""

import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

from sparity.checkpoints import packed_file
from sparity.checkpoints.shards import CODES
from sparity.engine.kernels.gemv import cpu
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.errors import SparityError
from sparity.formats import build_format, format_of

PLAIN = ("dense", "bitmask", "two_of_four", "columns", "csr", "coo")
FORMATS = (*({name: {}} for name in PLAIN), {"block": {"rows": 4}})
NAMES = (*PLAIN, "block", "base", "", None)
SIZES = {code: dtype.itemsize for dtype, code in CODES.items()}
THEIRS = (SparityError, OSError, ValueError, RuntimeError)  # transformers refuses some in its own words
OPTIONS = ({}, {"rows": 4}, {"rows": 5, "columns": 32}, {"rows": 2**40}, [], None, {"x": 1})
SIDES = (-1, 0, 1, 4, 5, 9, 11, 69, 71, 2**20, 2**31 - 1, 2**31, 2**63, 2**64, True, 10.0, "10", None)
WORDS = (b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 7 + b"\x80", b"\x80" * 8, b"\1" + b"\0" * 7)


def weight():
    """[10, 70]: two of every four, so that it fits every format."""
    drawn = torch.Generator().manual_seed(0)
    dense = torch.randn(10, 70, generator=drawn).bfloat16()
    dense[(torch.rand(10, 18, 4, generator=drawn).argsort(-1) >= 2).flatten(1)[:, :70]] = 0
    return dense


def split(content):
    """Header and tensors, by name, of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    return header, {name: bytearray(data[slice(*header[name]["data_offsets"])]) for name in names}


def joined(header, tensors, drawn):
    """The file again, with offsets and hashes that are right."""
    data, header = b"", dict(header)
    for name, content in tensors.items():
        header[name] = {**header[name], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    about = json.loads(header["__metadata__"]["sparity"])
    for name, entry in about["matrices"].items():
        for part in entry["hashes"]:
            entry["hashes"][part] = packed_file.hashlib.sha256(tensors.get(f"{name}.{part}", b"")).hexdigest()
        entry["hash"] = packed_file.entry_hash({key: value for key, value in entry.items() if key != "hash"})
    header["__metadata__"] = {**header["__metadata__"], "sparity": json.dumps(about)}
    text = json.dumps(header).encode() + b" " * drawn.randrange(9)  # also at odd addresses
    return len(text).to_bytes(8, "little") + text + data


def blind(content, drawn):
    """Some bytes changed, cut off, put in or doubled."""
    content = bytearray(content)
    for _ in range(drawn.randint(1, 4)):
        place = drawn.randrange(len(content))
        kind = drawn.random()
        if kind < 0.8:
            content[place] ^= drawn.randint(1, 255)
        elif kind < 0.87:
            del content[place:]
            content = content or bytearray(8)
        elif kind < 0.94:
            content[place:place] = drawn.randbytes(drawn.randint(1, 16))
        else:
            content[place:place] = content[place : place + drawn.randint(1, 64)]
    return bytes(content)


def knowing(content, drawn):
    """Content, shape, type, format or options changed, every hash made good."""
    header, tensors = split(content)
    about = json.loads(header["__metadata__"]["sparity"])
    for _ in range(drawn.choice((1, 1, 2))):
        if not tensors:
            break
        entry = drawn.choice(list(about["matrices"].values()))
        name = drawn.choice(list(tensors))
        _change(entry, name, header, tensors, drawn)
    header["__metadata__"]["sparity"] = json.dumps(about)
    return joined(header, tensors, drawn)


def _change(entry, name, header, tensors, drawn):
    kind = drawn.randrange(9)
    content, said = tensors[name], header[name]
    if kind <= 2 and content:
        width = SIZES[said["dtype"]]
        for _ in range(drawn.choice((1, 1, 1, 8))):
            place = drawn.randrange(len(content) // width) * width
            content[place : place + width] = drawn.choice((*WORDS, drawn.randbytes(8)))[:width]
    elif kind == 3 and isinstance(entry["shape"], list):
        entry["shape"][drawn.randrange(2)] = drawn.choice(SIDES)
    elif kind == 4:
        entry["dtype"] = drawn.choice(("float32", "float16", "bfloat16", "int8", 5, None, ["float32"]))
    elif kind == 5:
        entry["format"] = drawn.choice(NAMES)
    elif kind == 6:
        entry["options"] = drawn.choice(OPTIONS)
    elif kind == 7:
        longer = len(content) + SIZES[said["dtype"]] * drawn.choice((-1, 1, 7))
        tensors[name] = (content + bytes(64))[: max(0, longer)]
        said["shape"] = [len(tensors[name]) // SIZES[said["dtype"]]]
    else:
        fitting = [code for code, width in SIZES.items() if len(content) % width == 0]
        said["dtype"] = drawn.choice(fitting)
        said["shape"] = [len(content) // SIZES[said["dtype"]]]


def use(path):
    """Read, check, unpack and multiply every matrix of a file."""
    for matrix in packed_file.read(path).values():
        dense = format_of(matrix).unpack(matrix).float()
        if declines(matrix):
            continue
        native = NativeWeight(matrix)
        x = torch.where(torch.arange(dense.shape[1]) % 3 == 0, -1.0, 1.0).expand(2, -1).bfloat16()
        found, expected = cpu.gemv(native, x).float(), x.float() @ dense.T
        if bool(expected.isfinite().all()) and float(dense.abs().max()) < 1e30:
            room = 0.02 * dense.abs().sum(1) + 1e-30
            assert bool(((found - expected).abs() <= room).all()), f"{matrix.format}: another product"


def files(folder, seed, count):
    """Damage a file of every format, bfloat16 and int8, and one under Huffman codes."""
    drawn, seen = random.Random(seed), Counter()
    sound = []
    for spec in FORMATS:
        for values in ("same", "int8"):
            path = folder / "sound.safetensors"
            packed_file.write(
                path, {"a": build_format(spec).pack(weight(), values), "b": build_format("csr").pack(weight())}
            )
            use(path)
            sound.append(path.read_bytes())
    few = weight().repeat(4, 4).round()
    packed_file.write(
        path, {"a": build_format("bitmask").pack(few), "b": build_format("dense").pack(few, "int8")}, huffman=True
    )
    use(path)
    sound.append(path.read_bytes())
    path = folder / "damaged.safetensors"
    for _ in range(count):
        damage = drawn.choice((blind, knowing))
        path.write_bytes(damage(drawn.choice(sound), drawn))
        try:
            use(path)
            seen[f"{damage.__name__} read"] += 1
        except SparityError:
            seen[f"{damage.__name__} refused"] += 1
        except BaseException:
            shutil.copyfile(path, folder / "broken.safetensors")
            raise
    return seen


def folder(source, seed, count):
    """Damage one file of a packed model's folder at a time, and load the model by Sparity and by transformers."""
    from transformers import AutoModelForCausalLM

    import sparity

    drawn, seen = random.Random(seed), Counter()
    names = ["config.json", "sparity.safetensors.index.json", *(path.name for path in source.glob("*.safetensors"))]
    damaged = source.with_name("damaged")
    for number in range(count):
        name = names[number % len(names)]
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(source, damaged)
        content = (damaged / name).read_bytes()
        shard = name.endswith(".safetensors") and b'\\"masks\\"' in content
        (damaged / name).write_bytes((knowing if shard and drawn.random() < 0.7 else blind)(content, drawn))
        for load, errors in (
            (sparity.load, SparityError),
            (AutoModelForCausalLM.from_pretrained, THEIRS if name.endswith(".safetensors") else Exception),
        ):
            try:
                load(damaged)(torch.arange(8)[None])
                seen["read"] += 1
            except errors:
                seen["refused"] += 1
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = {"files": files, "folder": folder}[sys.argv[1]]
    print(json.dumps(run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
