"""What calls every compiled kernel, with tails, batches and odd values, to be compared between processors."""

from itertools import product

import torch

import sparity
from families import build, tiny_configs
from kernel_inputs import FORMATS, inputs, weight_for
from quick_models import decoded
from sparity.engine.kernels import native
from sparity.engine.kernels.attention.cpu import Chosen, Codes, Slots, attend_slots, choose_pages
from sparity.engine.kernels.attention_blocks.cpu import attend_blocks
from sparity.engine.kernels.gemv.cpu import gemv, gemv_many, gemv_rows
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.engine.kernels.skip.cpu import CODES as SCALES
from sparity.engine.kernels.skip.cpu import NativeSkip, skip
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.kernels.slots.cpu import slot_columns
from sparity.engine.kernels.step import cpu as step
from sparity.formats import build_format

SHAPES = ((1, 1), (3, 31), (5, 130), (33, 259), (18, 576))
TOKENS = (1, 2, 3, 7)
INT4 = tuple(product((32, 64, 128), (True, False), ("bfloat16", "float16", "float32")))[::2]


def random(*shape, seed=0, dtype=torch.bfloat16):
    """Numbers of a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def odd(x):
    """The same with numbers that are not finite, zeros of both signs and subnormal ones in the last token."""
    x[-1].view(-1)[: 5 * 3 : 3] = torch.tensor([torch.inf, torch.nan, -0.0, 1e-39, -torch.inf])[: len(x[-1][::3][:5])]
    return x


def bfloat16():
    """Products in bfloat16, in every format, and with what is not finite."""
    for (name, options), shape, keep in product(FORMATS.items(), SHAPES, (0.1, 0.5)):
        if keep != 0.5 and name not in ("bitmask", "block"):
            continue
        weight = NativeWeight(build_format({name: options}).pack(weight_for(name, *shape, keep=keep)))
        for tokens in TOKENS:
            gemv(weight, inputs(tokens, shape[1]), torch.empty(tokens, shape[0]))
        gemv(weight, odd(inputs(2, shape[1])))


def blocks():
    """Blocks of many sizes."""
    for rows, columns in ((1, 16), (4, 16), (20, 16), (3, 48), (8, 32), (9, 64)):
        form = build_format({"block": {"rows": rows, "columns": columns}})
        weight = NativeWeight(form.pack(weight_for("block", 70, 200, block=(rows, columns))))
        for tokens in TOKENS:
            gemv(weight, inputs(tokens, 200), torch.empty(tokens, 70))


def int8():
    """Products in int8: inputs are quantised too."""
    for name, shape in product(("dense", "bitmask", "two_of_four", "columns"), (*SHAPES, (6, 8200))):
        weight = NativeWeight(build_format(name).pack(weight_for(name, *shape), "int8"))
        for tokens in TOKENS:
            gemv(weight, inputs(tokens, shape[1]), torch.empty(tokens, shape[0]))
        gemv(weight, odd(inputs(2, shape[1])))


def int4():
    """Products in int4: every group, with and without zero points, scales of every type."""
    for name, (group, symmetric, kind) in product(("dense", "bitmask", "two_of_four", "columns"), INT4):
        for rows, columns in ((3, 128), (21, 384)):
            options = {"int4": {"group": group, "symmetric": symmetric, "scale_type": kind}}
            weight = NativeWeight(build_format(name).pack(weight_for(name, rows, columns), options))
            for tokens in (1, 3, 6):
                gemv(weight, inputs(tokens, columns), torch.empty(tokens, rows))


def largest():
    """Sums of whole numbers that are as large as they can be."""
    groups = [{"int4": {"group": 128, "symmetric": symmetric}} for symmetric in (True, False)]
    x = torch.full((3, 1024), 3.0).bfloat16()
    for name, encoding, sign in product(("dense", "bitmask", "two_of_four", "columns"), ("int8", *groups), (1, -1)):
        kept = torch.arange(1024) % 4 < 2 if name == "two_of_four" else torch.ones(1024)
        weight = NativeWeight(build_format(name).pack((sign * kept).expand(36, 1024).bfloat16(), encoding))
        for tokens in (1, 3):
            gemv(weight, x[:tokens], torch.empty(tokens, 36))


def parts():
    """Several weights at once, rows and channels that are listed, and weights as they are stored."""
    encodings = ("same", "int8", {"int4": {"group": 64}})
    names = ("dense", "bitmask", "two_of_four", "columns")
    made = {
        (name, i): NativeWeight(build_format(name).pack(weight_for(name, 70, 192), encodings[i]))
        for name, i in product(names, range(3))
    }
    gemv_many(list(made.values()), inputs(3, 192))
    for (name, i), weight in made.items():
        if name == "dense":
            gemv_rows(weight, torch.tensor([0, 3, 4, 41, 69], dtype=torch.int32), inputs(2, 192), torch.zeros(2, 70))
        elif name != "columns" or i == 2:
            for begin, end in ((0, 70), (4, 9)):
                panel = torch.empty(end - begin, 192, dtype=torch.int8 if i == 1 else torch.bfloat16)
                native.library().sparity_unpack(weight.address, begin, end, panel.data_ptr(), 1)
    units, slots = torch.tensor([2, 17, 40, 63]), torch.tensor([1, 0, 5, 2])
    for tokens in (1, 3):
        x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
        x[:, units] = random(tokens, 4)
        slot_columns(random(6, 70), slots, units, x)


def between_products():
    """Quantised inputs, skipped channels, norms, gates, and attention of a decoding step."""
    x = odd(inputs(4, 130))
    native.library().sparity_quantize(
        x.data_ptr(), 4, 130, torch.empty(4, 130, dtype=torch.int8).data_ptr(), torch.empty(4).data_ptr(), 1
    )
    for scale, centre, columns in product(SCALES, (None, 1), (15, 200)):
        rule = SkipRule(torch.tensor(0.7), centre and random(columns, seed=3), scale, kept=7, deviations=0.3)
        skip(NativeSkip(rule, columns), odd(random(3, columns)), torch.tensor([0, 1, 0], dtype=torch.uint8))
    for columns in (15, 200):
        x, out = odd(random(3, columns)), torch.empty(3, columns, dtype=torch.bfloat16)
        step.rms_norm(x, random(3, columns, seed=1), random(columns, seed=2), 1e-5, out)
        step.gate(x, random(3, columns, seed=1), out)
    for heads, width in ((5, 16), (8, 80)):
        of = step.Heads(heads, 1, width, width**-0.5, random(width, seed=5), random(width, seed=6), 1e-6)
        lengths, fresh = torch.tensor([[70], [3]]), torch.tensor([2, 1])
        view = step.CacheView(random(2, 1, 90, width), random(2, 1, 90, width, seed=1), lengths, torch.zeros(2, 1, 90))
        q, k, v = (random(3, count * width, seed=2 + count) for count in (heads, 1, 1))
        tables = random(3, width, seed=8), random(3, width, seed=9)
        visible = (torch.arange(140).view(2, 70) % 3 != 0).to(torch.uint8)
        step.attend(of, q, k, v, tables, view, torch.empty_like(q), fresh, visible)


def cache_of(width, bits, dtype):
    """Two heads of unlike lengths, as numbers or as codes in groups of 32 tokens."""
    lengths, starts = torch.tensor([70, 130]), torch.tensor([0, 70])
    if not bits:
        return Slots(*(random(200, width, seed=i, dtype=dtype) for i in (1, 2)), starts, lengths)
    packed = torch.randint(0, 256, (2, 200, width * bits // 8), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([32, 32, 6, 32, 32, 32, 32, 2], dtype=torch.int32)
    grids = [random(len(counts), width, seed=i, dtype=dtype) for i in (3, 4)]
    grids += [random(200, 1, seed=i, dtype=dtype) for i in (5, 6)]
    codes = Codes(bits, *grids, torch.tensor([0, 3]), torch.tensor([3, 5]), counts, width)
    return Slots(*packed.to(torch.uint8), starts, lengths, page=32, codes=codes)


def caches():
    """Attention over what a cache holds, as numbers and as codes, all of it or some pages."""
    for dtype, bits, group in product((torch.float32, torch.bfloat16), (0, 2, 4, 8), (1, 6)):
        q = random(1, 2 * group, 1, 64, dtype=dtype)
        attend_slots(q, [cache_of(64, bits, dtype)], 0.125, 131)
    dtype, drains = torch.float32, random(4, dtype=torch.float32)
    whole = cache_of(16, 0, dtype)
    places = torch.arange(200, dtype=torch.int32) % 90
    some = Chosen(torch.tensor([0, 2, 1, 4, 5], dtype=torch.int32), torch.tensor([2, 5]))
    parted = Slots(whole.keys, whole.values, whole.starts, whole.lengths, places=places, page=16)
    paged = Slots(whole.keys, whole.values, whole.starts, whole.lengths, page=16, chosen=some)
    visible = (torch.arange(131).view(1, 131) % 5 != 0).to(torch.uint8)
    attend_slots(random(1, 4, 2, 16, dtype=dtype), [parted], 0.25, 131, window=60, visible=visible, drains=drains)
    attend_slots(random(1, 4, 1, 16, dtype=dtype), [paged, whole], 0.25, 131, drains=drains)
    nothing, two = torch.tensor([0, 1]), torch.tensor([2, 3])
    for mean, levels in ((False, 0), (True, 3)):
        low, high = random(9, 32, seed=1, dtype=dtype), random(9, 32, seed=2, dtype=dtype).abs()
        at = torch.tensor([0, 4]), torch.tensor([4, 5])
        queries = random(1, 2, 3, 32, dtype=dtype)
        choose_pages(queries, low, low + high, *at, (nothing, nothing), two, mean=mean, levels=levels)


def prompts():
    """Attention of prompts by blocks."""
    for dtype, (new, tokens, block) in product(
        (torch.float32, torch.bfloat16), ((70, 90, (64, 64)), (33, 33, (8, 16)), (21, 40, (5, 3)))
    ):
        q, k, v = (
            random(2, heads, count, width, seed=heads + width, dtype=dtype)
            for heads, count, width in ((4, new, 32), (2, tokens, 32), (2, tokens, 48))
        )
        kept = random(2, 4, -(-new // block[0]), -(-tokens // block[1]), dtype=torch.float32) > 0
        attend_blocks(3 * q, k, v, kept, block, 0.2, pads=[0, 13], drains=random(4, dtype=torch.float32))


def steps():
    """Whole decoding steps of a tiny model."""
    torch.manual_seed(0)
    model = build(tiny_configs()["llama"]).bfloat16()
    sparity.attach(model, form="dense")
    decoded(model, torch.arange(12).view(2, 6))


EVERY = (bfloat16, blocks, int8, int4, largest, parts, between_products, caches, prompts, steps)
