"""The sentences on what a run did, word for word."""

from dataclasses import replace

import pytest
import torch

from sparity.measure.show import sentences, sentences_bench

ZEROS = "50.0 % of the weights in 8 projections are zero (target 50.0 %), 28.0 % of all parameters."
SHAPES = "6 projections are smaller: 352 of 400 parameters are left."
SKIPPED = "41.0 % of the input channels of 8 projections are skipped at run time (target 40.0 %)."


def said(report, **changes):
    return sentences.describe_changes(report, replace(report.candidates[0], **changes))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("pruned", ZEROS),
        ("cut", SHAPES),
        ("skipping", SKIPPED),
        ("quantised", "8 projections are rounded to 4.57 bits per weight on average, from 4 to 8."),
        ("healed", "No weight of 8 projections was removed, made zero or skipped."),
        ("nothing", "No projection was changed."),
        (
            "all",
            f"50.0 % of the weights in 8 projections are zero (target 50.0 %), 25.0 % of all parameters that are left. "
            f"{SHAPES} {SKIPPED.replace('41.0', '40.6')}",
        ),
    ],
)
def test_each_kind_of_change_has_its_sentence_and_no_other(kinds, kind, sentence):
    assert said(kinds[kind]) == sentence


def test_one_projection_and_blocks_that_are_gone(kinds):
    report = kinds["cut"]
    first, *others = report.candidates[0].changes
    assert said(report, changes=(first,)) == "1 projection is smaller: 352 of 400 parameters are left."
    gone = replace(first, shape_after=(0, 0))
    both = "1 projection is gone: 352 of 400 parameters are left."
    assert said(report, changes=(gone,)) == both
    both = "5 projections are smaller and 1 projection is gone: 352 of 400 parameters are left."
    assert said(report, changes=(gone, *others)) == both
    turned = replace(first, shape_after=first.shape_before[::-1])
    assert said(report, changes=(turned,)) == "1 projection is of another shape: 352 of 400 parameters are left."


def test_no_target_is_no_target(kinds):
    bare = tuple(replace(change, target=None) for change in kinds["skipping"].candidates[0].changes)
    assert said(kinds["skipping"], changes=bare) == SKIPPED.replace(" (target 40.0 %)", "")
    assert said(kinds["pruned"], target=None) == ZEROS.replace(" (target 50.0 %)", "")


def test_equal_bits_are_no_average(kinds):
    even = tuple(replace(change, bits=4.0) for change in kinds["quantised"].candidates[0].changes)
    assert said(kinds["quantised"], changes=even) == "8 projections are rounded to 4 bits per weight."


def test_stages_are_listed_in_their_order(kinds):
    one, three = kinds["pruned"].candidates[0], kinds["all"].candidates[0]
    assert sentences.describe_stages(one) == "One stage: pruned somehow."
    listed = "3 stages, one after the other: wanda, 50%; 25 % of the channels; thresholds, 40 %."
    assert sentences.describe_stages(three) == listed


def test_a_summary_of_several_is_short(kinds):
    report = kinds["all"]
    brief = sentences.summarise_briefly(report, replace(report.candidates[0], quality=(), speed=None))
    start = "50.0 % sparse, 88.0 % of the parameters left, 40.6 % skipped at run time."
    assert brief == f"{start} Quality was not measured. Speed was not measured."
    nothing = kinds["nothing"]
    assert sentences.summarise_briefly(nothing, nothing.candidates[0]).startswith("No weight removed or skipped. ")


def test_a_model_without_parameters_has_no_share_of_them(kinds):
    empty = replace(kinds["cut"], parameters=0)
    assert empty.left(empty.candidates[0]) is None
    assert kinds["cut"].left(kinds["cut"].candidates[0]) == 0.88
    assert kinds["pruned"].left(kinds["pruned"].candidates[0]) is None


def test_emulated_products_are_told(monkeypatch):
    assert sentences.describe_products(torch.bfloat16) is None
    assert sentences_bench.describe_products() is None
    monkeypatch.setenv("SPARITY_PRODUCTS", "float32")
    assert sentences.describe_products(torch.float32) is None
    assert sentences.describe_products(torch.float16) == (
        "Products of float16 are computed in float32 (own type: SPARITY_PRODUCTS=float32) here: calibration and "
        "quality were measured so, each product rounded to float16, for the dense and the sparse model alike. "
        "transformers was timed with its own."
    )
    assert "Part of the engine's lead to the first token" in sentences_bench.describe_products()
