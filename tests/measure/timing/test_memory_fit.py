"""Which batches fit, by bytes."""

import pytest
from transformers import GPT2Config, LlamaConfig

from sparity.measure.timing.memory_fit import Fit, available_memory, fit, working_bytes

GB = 1_000_000_000


def test_all_at_once_where_there_is_room():
    assert fit([2 * GB, GB], {1: GB, 8: 2 * GB}, 10 * GB) == Fit(True, (1, 8), ())


def test_a_batch_that_does_not_fit_is_left_out_with_its_numbers():
    found = fit([2 * GB, GB], {1: GB, 8: 7 * GB}, 10 * GB)  # 9 GB can be used
    assert (found.together, found.batches) == (True, (1,))
    assert [skip.batch for skip in found.skipped] == [8]
    assert found.skipped[0].reason == (
        "batch 8 needs about 7.0 GB beside 3.0 GB of weights of all contenders, and 9.0 GB of memory can be used"
    )


def test_one_after_another_where_all_at_once_do_not_fit():
    found = fit([5 * GB, 4 * GB], {1: GB, 8: 5 * GB}, 10 * GB)
    assert (found.together, found.batches) == (False, (1,))
    assert "5.0 GB of weights of the largest contender" in found.skipped[0].reason


@pytest.mark.parametrize(("available", "batches"), [(10 * GB, (1,)), (10 * GB - 20, ())])
def test_the_bound_is_nine_tenths_of_what_is_available(available, batches):
    assert fit([8 * GB], {1: GB}, available).batches == batches


def test_without_knowledge_everything_fits():
    assert fit([10**15], {1: 1, 32: 10**15}, None) == Fit(True, (1, 32), ())


def test_working_bytes_by_hand():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=10,
    )  # fmt: skip
    cache = 2 * 3 * 2 * 2 * (5 + 6 + 1) * 2  # keys and values, blocks, heads, width, tokens, bytes
    activations = 5 * (3 * 16 + 4 * 8) * 2
    assert working_bytes(config, 4, prompt=5, tokens=6) == 4 * (cache + activations + 10 * (2 + 8))


def test_working_bytes_of_a_model_with_other_names():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10)
    assert working_bytes(config, 1, 1, 1) == 2 * 2 * 4 * 3 * 2 + (3 * 32 + 4 * 8) * 2 + 100


def test_available_memory_is_a_number_of_bytes_on_linux():
    found = available_memory()
    assert found is None or 1_000_000 < found < 10**14
