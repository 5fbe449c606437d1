"""A shape planned for a real model: its recipe cuts to exactly that, and what cannot be has a clear answer."""

import copy

import pytest
import torch
from structure_models import varied

import sparity
from families import build, tiny_configs
from sparity.engine.kernels import native
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.dimensions import CHANNELS, DEPTH, HIDDEN
from sparity.pipeline.run.progress import Silence
from sparity.pipeline.studies.shapes.answer import share
from sparity.pipeline.studies.shapes.axes import Grid
from sparity.pipeline.studies.shapes.limits import Limits
from sparity.pipeline.studies.shapes.study import execute_plan

SMALL = {"dtype": "float32", "multiple_of": 8}


@pytest.fixture(scope="module")
def model():
    config = copy.deepcopy(tiny_configs()["llama"])
    config.num_hidden_layers = 4
    return varied(build(config, seed=3))


@pytest.mark.parametrize("method", ["minitron", "magnitude"])
def test_its_recipe_cuts_to_the_answer(model, token_files, tmp_path, method):
    text = {"tokens": token_files["calibration"]}
    report = sparity.plan_shape(model, at_most="55kB", method=method, calibration=text, **SMALL)
    sizes = report.answer.sizes
    assert report.answer.bytes <= 55_000 < report.dense.bytes
    assert list(sizes) == [DEPTH, CHANNELS, "kv_groups", HIDDEN]
    assert (report.answer.token, report.answer.prompt) == (None, None)
    recipe = {**report.recipe, "measure": {"speed": None}}
    made = sparity.run(recipe, model=model, output=tmp_path / "out")
    smaller = Decoder.open(made.path)
    config = smaller.config
    found = {
        DEPTH: config.num_hidden_layers, CHANNELS: config.intermediate_size,
        "kv_groups": config.num_key_value_heads, HIDDEN: config.hidden_size,
    }  # fmt: skip
    assert found == sizes
    assert sum(torch.Size(shape).numel() for shape in smaller.source.shapes().values()) * 4 == report.answer.bytes


def test_the_answer_is_the_first_of_the_front_that_keeps_the_limit(model):
    report = sparity.plan_shape(model, at_most="55kB", method="magnitude", **SMALL)
    assert report.front[0] == report.dense
    assert report.front[0].loss == 0
    assert report.answer == next(point for point in report.front if point.bytes <= 55_000)
    losses = [point.loss for point in report.front]
    sizes = [point.bytes for point in report.front]
    assert losses == sorted(losses)
    assert sizes == sorted(sizes, reverse=True)
    assert sparity.plan_shape(model, at_most="55kB", method="magnitude", **SMALL).to_dict() == report.to_dict()
    assert 0 < report.able < report.shapes


def test_a_limit_that_the_dense_model_keeps_cuts_nothing(model):
    report = sparity.plan_shape(model, at_most="1GB", method="magnitude", dimensions=[DEPTH], **SMALL)
    assert report.answer == report.dense
    assert report.recipe["stages"] == []
    assert report.able == report.shapes == 4


def test_a_limit_that_nothing_keeps_names_the_closest(model):
    with pytest.raises(InvalidInput, match=r"no shape keeps at most 1.0 kB: the closest is depth 1, mlp_channels 16: "):
        sparity.plan_shape(model, at_most=1000, method="magnitude", dimensions=[CHANNELS, DEPTH], **SMALL)


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
def test_speed_is_planned_from_the_prices_of_matrices_and_the_time_of_the_model():
    asked = Limits.of("1.2x", None, "7.5MB")
    base = {"model": "zoo:llama", "dtype": "bfloat16"}
    grid, kinds = Grid(steps=4), [DEPTH, CHANNELS]

    def clock(rows, columns, inputs):
        return 1e-3 * rows * columns * (1 + inputs)  # so slow that all of the model's time is that of its matrices

    report = execute_plan(base, asked, grid, "magnitude", {}, kinds, Silence(), clock=clock)
    assert report.answer.token * 1.2 <= report.dense.token
    assert report.answer.bytes <= 7_500_000
    # q, k, v: 384 x 192; o: 192 x 192; gate, up: 1024 x 192; down: 192 x 512; head: 8192 x 192
    block = 384 * 192 + 192 * 192 + 1024 * 192 + 192 * 512
    assert report.dense.token == pytest.approx(2e-3 * (6 * block + 8192 * 192))
    assert report.dense.prompt == pytest.approx(1e-3 * (129 * 6 * block + 2 * 8192 * 192))
    assert all(point.token for point in report.front)


def test_bad_questions(model):
    for options, words in (
        ({"method": "flap"}, "flap does not rank the parts .* use one of bonsai, magnitude, minitron"),
        ({"method": "magnitude", "options": {"dimension": "depth"}}, "the search sets dimension itself"),
        ({"method": "magnitude", "at_most": None}, "a limit is missing"),
        (
            {"method": "magnitude", "at_least": "2x"},
            "not float32: pass --dtype bfloat16, or limit bytes alone",
        ),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.plan_shape(model, **{"at_most": "1MB", "dtype": "float32", **options})


@pytest.mark.parametrize(("dimension", "whole"), [(CHANNELS, 64), (DEPTH, 4), ("kv_groups", 2), (HIDDEN, 32)])
def test_a_share_leaves_exactly_so_many(model, dimension, whole):
    decoder = Decoder.open(model)
    for left in range(1, whole):
        found = share(decoder, dimension, whole, left)
        removed = int(whole * found + 0.5) if dimension == DEPTH else int(whole * found)
        assert whole - removed == left
        assert len(str(found)) <= 5
