"""What a shape has in it and costs: against models that are really cut, and sums worked by hand."""

import copy
import itertools

import pytest
import torch

import sparity
from families import build, tiny_configs
from sparity.engine.kernels import call_time, choice_file, native
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.dimensions import CHANNELS, DEPTH, HIDDEN
from sparity.pipeline.studies.shapes.axes import Grid, axes_of, lost
from sparity.pipeline.studies.shapes.limits import Least, Limits
from sparity.pipeline.studies.shapes.prices import Costs, Rest, kernel_seconds, matrix_seconds, priced, rest_of
from sparity.pipeline.studies.shapes.tensors import Legal, layout_of

GRID = Grid(steps=4, multiple_of=8, least=0.25)
HEADS = {"llama": "kv_groups", "qwen3": "kv_groups", "gemma2": "kv_groups"}
FREE = ("llama", "qwen3")  # families whose hidden size can be cut
CUT = {"llama": 4, "qwen3": 4, "gemma2": 3, "phi3": 2, "opt": 2, "gpt_neox": 2, "gpt2": 2, "qwen2": 2}


def opened(kind, layers=3):
    config = copy.deepcopy(tiny_configs()[kind])
    config.num_hidden_layers = layers
    model = build(config, seed=3)
    return model, Decoder.open(model)


def planned(model, decoder, wanted=None, grid=GRID):
    scores = sparity.structure_scores(model, None, method="magnitude")
    axes = axes_of(decoder, scores, wanted, grid)
    return axes, layout_of(decoder, axes)


def kept(sizes, depth):
    """The first units of everything."""
    shared = (DEPTH, HIDDEN)
    return {name: range(size) if name in shared else [range(size)] * depth for name, size in sizes.items()}


def numbers_of(model):
    return sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())


@pytest.mark.parametrize("kind", CUT)
def test_bytes_and_matrices_are_those_of_the_model_that_is_cut(kind):
    model, decoder = opened(kind)
    axes, layout = planned(model, decoder)
    assert len(axes) == CUT[kind]
    assert {axis.name for axis in axes} >= {DEPTH, CHANNELS}
    assert (HIDDEN in [axis.name for axis in axes]) == (kind in FREE)
    legal = Legal(decoder)
    ends = [(axis.sizes[0], axis.sizes[len(axis.sizes) // 2], axis.whole) for axis in axes]
    every = [dict(zip((a.name for a in axes), sizes, strict=True)) for sizes in itertools.product(*ends)]
    tried = [sizes for sizes in every if legal(sizes)][:: 5 if len(axes) > 2 else 1]
    assert len(tried) >= 5
    for sizes in tried:
        smaller = sparity.cut(model, kept(_without_groups(sizes), len(decoder)))
        if "kv_groups" in sizes:
            smaller = sparity.cut(smaller, {"kv_groups": [range(sizes["kv_groups"])] * sizes[DEPTH]})
        assert layout.bytes(sizes) == 4 * numbers_of(smaller), sizes
        found = [
            (sum(p.weight.shape[0] for p in site.projections), site.projections[0].weight.shape[1])
            for site in Decoder.open(smaller).sites(0)
        ]
        assert layout.matrices(sizes) == found
        assert layout.head_matrix(sizes) == tuple(smaller.get_output_embeddings().weight.shape)


def _without_groups(sizes):
    return {name: size for name, size in sizes.items() if name != "kv_groups"}


def test_only_legal_sizes_are_tried_together():
    model, decoder = opened("llama")  # whose hidden size must be a multiple of its heads: 4, or 2 with one group
    axes, _ = planned(model, decoder, grid=Grid(steps=32, multiple_of=1))
    by_name = {axis.name: axis for axis in axes}
    assert by_name["kv_groups"].sizes == (1, 2)
    assert by_name[HIDDEN].sizes == (8, 12, 16, 20, 24, 28, 32)
    assert by_name[DEPTH].sizes == (1, 2, 3)
    legal = Legal(decoder)
    whole = {axis.name: axis.whole for axis in axes}
    assert legal({**whole, "kv_groups": 1, HIDDEN: 28})
    assert legal({DEPTH: 1, CHANNELS: 3, "kv_groups": 1, HIDDEN: 30})
    assert not legal({**whole, HIDDEN: 30})
    assert not legal({**whole, "kv_groups": 1, HIDDEN: 31})


def test_sizes_are_steps_of_the_whole_rounded_up():
    assert Grid(4, 32, 0.0).sizes(CHANNELS, 300) == (96, 160, 256, 300)
    assert Grid(4, 32, 0.5).sizes(HIDDEN, 128) == (64, 96, 128)
    assert Grid(4, 32, 0.0).sizes("kv_groups", 3) == (1, 2, 3)
    assert Grid(8, 32, 0.5).sizes(DEPTH, 6) == (3, 4, 5, 6)
    assert Grid(1).sizes(DEPTH, 6) == (6,)
    for wrong in ({"steps": 0}, {"multiple_of": 0}, {"least": 1.5}, {"least": float("nan")}):
        with pytest.raises(InvalidInput, match="1 or more"):
            Grid(**wrong)


def test_the_share_of_importance_that_goes():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert [lost(scores, size) for size in (1, 2, 3, 4)] == pytest.approx([(0.6 + 0.75) / 2, 0.4, (0.1 + 0.25) / 2, 0])
    assert lost(scores[0], 2) == pytest.approx(0.3)
    assert lost(torch.tensor([[-5.0, 1.0, 3.0]]), 2) == pytest.approx(0)
    assert lost(torch.zeros(4), 1) == pytest.approx(0.75)
    assert lost(torch.tensor([[2.0, 2.0], [float("nan"), float("nan")]]), 1) == pytest.approx(0.5)


def test_seconds_are_those_of_blocks_and_of_the_rest():
    model, decoder = opened("llama")
    axes, layout = planned(model, decoder)

    def clock(rows, columns, inputs):
        return rows * columns * inputs / 1e6

    costs = Costs(layout, {"decode": Rest(0.25, 2.0), "prefill": Rest(1.0, 3.0)}, priced(axes, layout, clock, print))
    sizes = {DEPTH: 2, CHANNELS: 16, "kv_groups": 1, HIDDEN: 16}
    # q, k, v: (16 + 8 + 8) x 16; o: 16 x 16; gate, up: 32 x 16; down: 16 x 16; head: 97 x 16
    block, head = (32 * 16 + 16 * 16 + 32 * 16 + 16 * 16) / 1e6, 97 * 16 / 1e6
    found = costs(sizes)
    assert found["decode"] == pytest.approx(2 * (block + 0.25) + head + 2.0, rel=1e-12)
    assert found["prefill"] == pytest.approx(2 * (128 * block + 1.0) + head + 3.0, rel=1e-12)
    assert found["bytes"] == layout.bytes(sizes)
    for picked in itertools.product(*(axis.sizes for axis in axes)):  # each matrix of each has been timed
        costs(dict(zip((axis.name for axis in axes), picked, strict=True)))
    assert matrix_seconds(layout, sizes, 1, clock) == pytest.approx((block, head))


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
def test_a_matrix_is_timed_as_the_dense_kernels_multiply_it(monkeypatch, tmp_path):
    products = []

    def timer(calls):
        products.extend((name, tuple(call().shape)) for name, call in calls.items())
        return dict.fromkeys(calls, 0.5)

    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_file, "_known", {})
    monkeypatch.setattr(call_time, "default_timer", lambda: timer)
    assert kernel_seconds(24, 64, 128) == kernel_seconds(24, 64, 1) == kernel_seconds(24, 64, 1) == 0.5
    assert products == [("dense", (128, 24)), ("dense", (1, 24))]  # each once: the third was remembered


@pytest.mark.parametrize(
    ("whole", "half", "expected"),
    [
        (10.0, 6.0, Rest(1.0, 1.0)),  # 4 blocks of 1 + 1, the head 1, and 1 once
        (10.0, None, Rest(0.0, 5.0)),
        (10.0, 9.5, Rest(0.0, 5.0)),  # a block in less time than its matrices alone: noise
        (10.0, 0.0, Rest(1.25, 0.0)),  # and more of it than there is
        (4.0, 2.0, Rest(0.0, 0.0)),
    ],
)
def test_what_matrices_leave_of_the_dense_model(whole, half, expected):
    assert rest_of(whole, half, depth=4, inside=1.0, head=1.0) == expected


def test_dimensions_that_a_model_cannot_lose():
    model, decoder = opened("qwen2")
    with pytest.raises(InvalidInput, match="cannot say how wide a head is"):
        planned(model, decoder, ["kv_groups"])
    with pytest.raises(InvalidInput, match='the score has no dimension "heads" in this model: it has depth, mlp_chan'):
        planned(model, decoder, ["heads"])
    with pytest.raises(InvalidInput, match="no size below 3 is tried"):
        planned(model, decoder, [DEPTH], Grid(least=1.0))
    with pytest.raises(InvalidInput, match="there is no dimension of this model that could be smaller"):
        planned(model, decoder, None, Grid(least=1.0))
    with pytest.raises(InvalidInput, match="models without experts"):
        axes_of(Decoder.open(build(tiny_configs()["mixtral"])), {}, None, GRID)
    ragged = sparity.cut(opened("llama")[0], {CHANNELS: [range(8), range(16), range(16)]})
    with pytest.raises(InvalidInput, match="have different sizes already"):
        axes_of(Decoder.open(ragged), {}, None, GRID)


def test_blocks_that_a_rule_of_their_number_tells_apart_stay_what_they_are():
    decoder = opened("llama", 4)[1]
    decoder.config.sliding_window_pattern = 2
    scores = {DEPTH: torch.tensor([4.0, 3.0, 1.0, 2.0])}  # 3 left: 0, 1, 3, of which 3 would be an even one
    assert axes_of(decoder, scores, None, GRID)[0].sizes == (1, 2, 4)


def test_limits_as_users_write_them():
    found = Limits.of("1.5x", "200 tokens/s", "1.5MB")
    assert found.most({"decode": 3.0, "prefill": 5.0, "bytes": 1e9}) == {
        "decode": 2.0, "prefill": 0.64, "bytes": 1_500_000,
    }  # fmt: skip
    assert found.goals == ("decode", "prefill", "bytes")
    assert found.words == "decode 1.5x and prefill 200 tokens/s and at most 1.5 MB"
    assert not Limits.of(None, None, 100).timed
    assert Least.of("--at-least", "40tokens/s") == Least(40.0, False)
    for wrong in ("1.5", "x", "0x", "fast", "1.5x 2x"):
        with pytest.raises(InvalidInput, match=r'--prefill .*: write it as "1.5x"'):
            Limits.of(None, wrong, None)
    with pytest.raises(InvalidInput, match="a limit is missing"):
        Limits.of(None, None, None)
    with pytest.raises(InvalidInput, match="--at-most: memory 'big'"):
        Limits.of(None, None, "big")
