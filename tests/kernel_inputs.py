"""Weights and inputs for the kernels."""

import torch

FORMATS = {
    "dense": {},
    "bitmask": {},
    "two_of_four": {},
    "block": {"rows": 16, "columns": 16},
    "columns": {},
}


def weight_for(name, rows, columns, seed=0, keep=0.5, block=(16, 16)):
    """A random bfloat16 weight in the pattern of a format."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if name == "bitmask":
        kept = torch.rand(rows, columns, generator=generator) < keep
    elif name == "two_of_four":
        order = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(-1)
        kept = (order < 2).flatten(1)[:, :columns]
    elif name == "block":
        down, across = -(-rows // block[0]), -(-columns // block[1])
        kept = torch.rand(down, across, generator=generator) < keep
        kept = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    else:
        kept = torch.ones(rows, columns, dtype=torch.bool)
    return torch.where(kept, weight, 0.0).bfloat16()


def inputs(tokens, columns, seed=1):
    """Random bfloat16 inputs, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, :: max(1, columns // 3)] *= 20
    return x.bfloat16()


def rounded(result, dtype):
    """float32 numbers as Triton's kernels store them in `dtype`: its interpreter cuts bfloat16 off, a GPU rounds."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        result = torch.where(result.isfinite(), result.view(torch.int32) & ~0xFFFF, result.view(torch.int32))
        result = result.view(torch.float32)
    return result.to(dtype)


def place(dtype):
    """How far `rounded` may move a number, relative to it."""
    return {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
