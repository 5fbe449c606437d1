"""A run within a limit of memory: the same checkpoint, Gram matrices in files, and less memory taken."""

import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparity
from sparity.errors import InvalidInput
from sparity.measure.data.machine import watch_peak_memory
from sparity.memory import give_back
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.pipeline.run.planned_memory import plan_memory
from sparity.recipe import Recipe

WIDE = 5120  # of the MLP: more than is factorised at once, five panels


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of one block, its MLP as wide as that of a small model of today, and few tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=WIDE, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = torch.randint(0, 64, (3, 48), generator=torch.Generator().manual_seed(1))
    np.save(folder / "tokens.npy", tokens.numpy())
    return folder


def recipe_of(folder, **stage):
    return {
        "model": str(folder),
        "calibration": {"tokens": str(folder / "tokens.npy")},
        "stages": [{"prune": stage or {"solver": "sparsegpt"}}],
        "measure": {"perplexity": [], "speed": None},
    }


def taken(folder, output, limit):
    """Peak resident bytes of a run beside what is there before it."""
    give_back()
    with watch_peak_memory() as peak:
        before = peak()
        sparity.run(recipe_of(folder), output=output, device="cpu", memory=limit)
        return peak() - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_limit_is_kept_and_the_checkpoint_is_the_same(wide, tmp_path):
    job = prepare(Recipe.read(recipe_of(wide)), device="cpu")
    free, limit = plan_memory(job), 130_000_000
    limited = plan_memory(job, limit)
    assert free.sums is None
    assert free.peak > 200_000_000
    assert limited.peak <= limit
    assert limited.passes > 1
    assert limited.disk > WIDE**2 * 8
    assert taken(wide, tmp_path / "free", None) > limit
    assert taken(wide, tmp_path / "limited", limit) <= limit
    names = [sorted(path.name for path in (tmp_path / run).glob("*.safetensors")) for run in ("free", "limited")]
    assert names[0] == names[1] != []
    for name in names[0]:
        assert (tmp_path / "free" / name).read_bytes() == (tmp_path / "limited" / name).read_bytes()
    assert not list((tmp_path / "limited").rglob("scratch-*"))


def test_a_limit_that_cannot_be_kept_names_what_is_needed(wide):
    job = prepare(Recipe.read(recipe_of(wide)), device="cpu")
    with pytest.raises(InvalidInput, match=r"0\.01 GB are not enough: this run takes at least 0\.\d+ GB .*solver"):
        plan(job, "10MB")
    with pytest.raises(InvalidInput, match="not enough"):  # nothing of Wanda's lies in files
        plan(prepare(Recipe.read(recipe_of(wide, score="wanda")), device="cpu"), "1MB")
    with pytest.raises(InvalidInput, match="bytes, or a number with"):
        plan(job, "much")


def test_a_limit_with_room_for_all_changes_nothing(wide):
    job = prepare(Recipe.read(recipe_of(wide)), device="cpu")
    assert plan_memory(job, "100GB") == plan_memory(job)


def test_the_plan_tells_of_more_passes(wide):
    job = prepare(Recipe.read(recipe_of(wide)), device="cpu")
    limited, free = plan(job, "130MB"), plan(job)
    assert limited.gram_passes > 1
    assert limited.disk["Gram matrices"] == plan_memory(job, "130MB").disk
    assert "Gram matrices" not in free.disk
    assert limited.peak_memory <= 130_000_000 < free.peak_memory
