"""Shapes and schedules of the zoo."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from zoo_plans import PLANS, Drill, Plan, opt

PLAN = Plan(
    opt(64, 1, 64), 10, 4, sequences=8, at_once=4, context=256, longer=2, drills=(Drill(2, 64, 0.9), Drill(4, 256, 0.5))
)


def test_drills_come_first_each_with_a_context_of_its_own():
    assert [PLAN.lesson(step, long=False) for step in (0, 1)] == [(32, 64, 0.9)] * 2
    assert [PLAN.lesson(step, long=False) for step in (2, 3)] == [(8, 256, 0.5)] * 2
    assert PLAN.lesson(4, long=False) == (8, 256, 0.07)


def test_contexts_are_longer_where_they_shall_be_but_not_in_drills():
    assert PLAN.lesson(1, long=True) == (32, 64, 0.9)
    assert PLAN.lesson(4, long=True) == (4, 512, 0.07)


def test_the_share_that_asks_for_recall_is_the_mean_over_all_steps():
    assert PLAN.asked(10) == pytest.approx((2 * 0.9 + 2 * 0.5 + 6 * 0.07) / 10)


@pytest.mark.parametrize("size", PLANS)
def test_every_step_of_a_plan_has_the_same_number_of_tokens_and_fits_the_context(size):
    for plan in PLANS[size].values():
        for step in range(0, plan.steps, 50):
            for long in (False, True):
                sequences, context, _ = plan.lesson(step, long)
                assert sequences * context == plan.sequences * plan.context
                assert context <= plan.config.max_position_embeddings


@pytest.mark.parametrize("size", PLANS)
def test_about_seven_in_a_hundred_sequences_ask_for_recall(size):
    assert all(0.06 < plan.asked(plan.steps) < 0.11 for plan in PLANS[size].values())


@pytest.mark.parametrize("size", PLANS)
def test_every_shape_computes(size):
    for plan in PLANS[size].values():
        model = AutoModelForCausalLM.from_config(plan.config)
        assert model(torch.arange(5)[None]).logits.shape == (1, 5, 8192)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_all_models_in_bf16_and_their_tokenizers_take_at_most_32_mb(size):
    with torch.device("meta"):
        models = {name: AutoModelForCausalLM.from_config(plan.config) for name, plan in PLANS[size].items()}
    counts = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    assert 2 * counts["llama"] <= 20e6
    assert 2 * sum(counts.values()) + 3 * 0.56e6 <= 32e6
