"""Rooflines by hand: one matrix, one processor whose peaks are round numbers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparity.measure.data.hardware import DATA_SHEETS, Hardware, read_rate
from sparity.measure.data.outcome import Outcome
from sparity.measure.data.roofline import DECODING, ENGINE, LIBRARY, STORED, Shape, attention, product, roof
from sparity.measure.show.table_roofline import describe_roof, render_rooflines, short
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import flops_per_second, plan
from sparity.pipeline.run.roofline import shape_of
from sparity.recipe import Recipe
from sparity.stages import Change

GPU = Hardware("gpu", bandwidth=1e9, flops=1e12, two_of_four=True, engine=False, source="")
CPU = Hardware("cpu", bandwidth=1e9, flops=1e11, two_of_four=False, engine=True, source="")
SIDE = 1000
# No head, no cache to speak of: the matrix is all there is.
CONFIG = SimpleNamespace(
    num_attention_heads=1, num_hidden_layers=0, head_dim=1, hidden_size=1, vocab_size=0, num_key_value_heads=1
)
CONFIG.get_text_config = lambda: CONFIG


def change(zeros=0.0, target=0.5, after=(SIDE, SIDE), **more):
    return Change("prune", "m", "q", 0, (SIDE, SIDE), after, zeros, target, **more)


def shape(*changes, pattern="unstructured", packed=False):
    return Shape((Outcome(changes),), {"m": pattern}, 0, CONFIG, packed)


def test_a_product_takes_the_longer_of_both_times():
    """A million weights of 2 bytes at 1 GB/s are 2 ms; 2 million operations a token at 1 TFLOP/s are 2 µs."""
    assert product(1e6, 1.0, 1.0, 1, GPU).seconds == pytest.approx(2e-3)
    assert product(1e6, 1.0, 1.0, 1000, GPU).seconds == pytest.approx(2e-3)  # the ridge
    assert product(1e6, 1.0, 1.0, 4000, GPU).seconds == pytest.approx(8e-3)


def test_attention_by_hand():
    config = SimpleNamespace(num_attention_heads=4, num_hidden_layers=3, head_dim=8, num_key_value_heads=2)
    step = attention(config, prompt=10, batch=2, decoding=True, hardware=GPU)
    assert step.bytes == 2 * 3 * 2 * 8 * 10 * 2 * 2  # keys and values, layers, heads, width, tokens, rows, bytes
    assert step.flops == 4 * 3 * 4 * 8 * 10 * 2
    assert attention(config, 10, 2, False, GPU).flops == step.flops * 10 / 2


def test_unstructured_zeros_are_no_real_speed_on_a_gpu():
    found = roof(shape(change(0.5)), GPU)
    assert found.gains == (1.0, 1.0)
    assert found.real is False
    assert "NO REAL SPEED HERE; zeros that lie so (unstructured)" in describe_roof(found)


def test_two_of_four_on_a_gpu():
    """Half of the values with 2 bits of position each: 0.5 + 1/16 of the bytes, half of the operations."""
    found = roof(shape(change(0.5), pattern="2 of 4 kept"), GPU, prompt=8000)
    assert found.gains == (pytest.approx(1 / 0.5625), pytest.approx(2.0))
    assert found.reasons == (LIBRARY,)
    four_of_eight = roof(shape(change(0.5), pattern="4 of 8 kept"), GPU)
    assert four_of_eight.real is False


def test_zeros_on_our_engine():
    """Packed: half of the values and a bit per weight; prompts gain nothing. Plain: nothing at all."""
    packed = roof(shape(change(0.5), packed=True), CPU, prompt=8000)
    assert packed.gains == (pytest.approx(1 / 0.5625), 1.0)
    assert packed.reasons == (DECODING,)
    plain = roof(shape(change(0.5)), CPU)
    assert (plain.gains, plain.reasons, plain.real) == ((1.0, 1.0), (STORED,), False)


def test_few_zeros_are_not_slower_than_dense():
    assert roof(shape(change(0.03), packed=True), CPU).gains == (1.0, 1.0)  # a mask would be larger than what it saves


def test_smaller_shapes_gain_everywhere():
    cut = change(0.0, None, after=(SIDE // 2, SIDE))
    for hardware in (GPU, CPU):
        found = roof(shape(cut), hardware, prompt=8000)
        assert found.gains == (pytest.approx(2.0), pytest.approx(2.0))
        assert found.reasons == ()


def test_skipped_channels_gain_on_our_engine_and_keep_the_zeros_before_them():
    skipped = change(0.0, 0.4, skipped=0.4)
    assert roof(shape(skipped), CPU).gains == (pytest.approx(1 / 0.6), 1.0)
    assert roof(shape(skipped), GPU).reasons == (ENGINE,)
    both = roof(shape(change(0.5), skipped, packed=True), CPU)
    assert both.gains[0] == pytest.approx(1 / (0.5625 * 0.6))


def test_what_no_stage_touches_counts_in_both():
    """As many weights again that stay: 1 and 1 against 0.5625 and 1."""
    half = replace(shape(change(0.5), packed=True), untouched=SIDE * SIDE)
    assert roof(half, CPU).gains[0] == pytest.approx(2 / 1.5625)


def test_batches_make_products_bound_by_arithmetic():
    many = roof(shape(change(0.5), pattern="2 of 4 kept"), GPU, batch=4000)
    assert many.dense[0].seconds == pytest.approx(8e-3)
    assert many.gains[0] == pytest.approx(2.0)


def test_a_recipe_s_shape_has_every_projection_once():
    recipe = {
        "model": "zoo:llama",
        "stages": [{"prune": {"score": "magnitude", "pattern": "2:4", "dense": ["*mlp*"]}}],
    }
    job = prepare(Recipe.read(recipe))
    found = shape_of(job, plan(job))
    sites = [site for index in range(len(job.decoder)) for site in job.decoder.sites(index)]
    weights = sum(projection.weight.numel() for site in sites for projection in site.projections)
    assert sum(one.size for one in found.outcomes) + found.untouched == weights
    assert set(found.patterns.values()) == {"2 of 4 kept"}
    gains = roof(found, DATA_SHEETS["h100"]).gains
    assert 1.0 < gains[0] < 1.3  # attention is a quarter of the blocks


def test_the_table_and_the_units():
    table = render_rooflines([roof(shape(change(0.5)), GPU), roof(shape(change(0.5)), CPU)])
    assert table.row_count == 2
    assert [short(3.4e-5), short(0.0123)] == ["34 µs", "12 ms"]
    assert read_rate(1 << 20, 1) > 1e6


@pytest.mark.parametrize(("products", "computed"), [("float32", torch.float32), ("own", torch.bfloat16)])
def test_the_rate_is_that_of_the_products_that_are_used(monkeypatch, products, computed):
    made, ones = [], torch.ones
    monkeypatch.setenv("SPARITY_PRODUCTS", products)
    monkeypatch.setattr(torch, "ones", lambda *size, **options: made.append(options["dtype"]) or ones(*size, **options))
    assert flops_per_second(torch.bfloat16, "cpu", size=8) > 0
    assert flops_per_second(torch.float64, "cpu", size=8) > 0
    assert made == [computed, torch.float64]
