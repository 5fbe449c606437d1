"""Models whose neurons, or experts, are on disk compute what they compute in memory, within every limit."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from offloaded import opened

import sparity
from sparity.engine.attach import attached
from sparity.engine.kernels.slots import cpu
from sparity.errors import InvalidInput

IDS = torch.arange(24)[None] * 101 % 8192
CASES = {
    "relu": ("zoo:relu", {}, "output"),
    "cats": ("zoo:llama", {"method": "cats", "sparsity": 0.6}, "gate"),
    "teal": ("zoo:llama", {"method": "teal", "sparsity": 0.6, "sites": "hidden"}, "output"),
    "dejavu": ("zoo:relu", {"method": {"dejavu": {"steps": 10}}, "sparsity": 0.6}, "predictor"),
    "gated dejavu": ("zoo:llama", {"method": {"dejavu": {"steps": 10}}, "sparsity": 0.4}, "predictor"),
    "moe": ("zoo:moe", {}, "experts"),
}


def decoded(model, prompt=8):
    """The logits of a prompt and of the tokens after it, one by one."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for fresh in (IDS[:, :prompt], *IDS[:, prompt:].split(1, 1)):
            found.append(model(input_ids=fresh, past_key_values=cache).logits)
    return torch.cat(found, 1)


def limits(written):
    """The least memory, a middle, and enough for all."""
    least = written.least_bytes
    return least, least + written.far_bytes // 3, least + 2 * written.far_bytes


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_model_in_memory(written, name):
    """In float32, under the same masks: the same tokens, and logits that differ by roundings."""
    source, options, kind = CASES[name]
    plain, done = written(source, **options)
    assert done.kind == kind
    model = sparity.load(plain, dtype="float32")
    wanted = decoded(model)
    for memory in limits(done)[:2]:
        with opened(done.folder, memory, ahead=True) as far:
            found = decoded(far)
            assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
            assert torch.equal(found.argmax(-1), wanted.argmax(-1))
            assert far.sparity_offload.memory_bytes <= memory


@pytest.mark.parametrize("name", ["relu", "cats", "gated dejavu", "moe"])
def test_no_bit_depends_on_the_memory_or_on_how_it_is_used(written, name):
    source, options, _ = CASES[name]
    _, done = written(source, "bfloat16", **options)
    found = []
    ways = (
        {"hot": 1.0, "ahead": False},
        {"hot": 0.0, "window": 2, "ahead": True},
        {"hot": 0.5, "ahead": True, "threads": 1},
    )
    least, middle, enough = limits(done)
    for memory, more in [(least, {}), (enough, {}), *((middle, way) for way in ways)]:
        with opened(done.folder, memory, **more) as far:
            found.append(decoded(far))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_generate_is_transformers_own(written):
    _, done = written("zoo:relu")
    options = {"max_new_tokens": 8, "do_sample": False}
    made = sparity.load("zoo:relu", dtype="float32").generate(IDS[:, :8], **options)
    with opened(done.folder, done.least_bytes) as far:
        assert torch.equal(far.generate(IDS[:, :8], **options), made)


def test_neurons_in_memory_cost_no_reads_and_few_of_them_many(written):
    _, done = written("zoo:relu")
    least, middle, enough = limits(done)
    bytes_ = []
    for memory in (least, middle, enough):
        with opened(done.folder, memory, ahead=False) as far:
            decoded(far)
            counts = far.sparity_offload.counts
            assert counts.bytes == counts.missed * done.record_bytes
            bytes_.append(counts.bytes)
    assert bytes_[0] > bytes_[1] > 0
    with opened(done.folder, enough, hot=1.0) as far:
        decoded(far)
        assert far.sparity_offload.counts.bytes == 0
        assert far.sparity_offload.counts.hit_rate == 1
        assert far.sparity_offload.bound.missed_bytes == 0
        assert "the disk is no limit" in far.sparity_offload.bound.words


def test_a_layer_in_memory_gives_the_bits_of_the_engine(written):
    """A bfloat16 model with CATS: the far MLP beside the engine's own, which skips the same neurons."""
    plain, done = written("zoo:llama", "bfloat16", method="cats", sparsity=0.6)
    part = torch.zeros(1, 1).bfloat16()
    if reason := cpu.declines(part, part):
        pytest.skip(reason)
    model = sparity.load(plain)
    x = torch.randn(1, 1, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    with opened(done.folder, done.least_bytes) as far, torch.no_grad():
        mlp, other = model.model.layers[2].mlp, far.model.layers[2].mlp
        gate = mlp.act_fn(mlp.gate_proj(x))
        with attached(model, form="dense"):
            up = mlp.up_proj(x)
        found = other.act_fn(other.gate_proj(x))
        assert torch.equal(found, gate)
        used = gate != 0
        assert torch.equal(other.up_proj(x)[used], up[used])


def test_whole_numbers_are_exact(written):
    """Sums of whole numbers know no rounding: an MLP on disk gives every bit of transformers' own."""
    _, done = written("zoo:relu")
    model = sparity.load("zoo:relu", dtype="float32")
    with opened(done.folder, done.least_bytes) as far, torch.no_grad():
        for index, layer in enumerate(far.sparity_offload.layers):
            mine = model.model.decoder.layers[index].fc2
            fresh = torch.Generator().manual_seed(index)
            whole = torch.randint(-8, 9, mine.weight.shape, generator=fresh).float()
            mine.weight.copy_(whole)
            far.model.decoder.layers[index].fc2.bias.copy_(mine.bias.round())
            mine.bias.copy_(mine.bias.round())
            units = torch.arange(0, 768, 3)
            slots = layer.take(units)
            layer.arena.parts[0][slots.long()] = whole.T[units]
            x = torch.zeros(2, 768)
            x[:, units] = torch.randint(0, 5, (2, 256), generator=fresh).float()
            layer.take = lambda units, layer=layer: layer.here(units)
            assert torch.equal(far.model.decoder.layers[index].fc2(x), mine(x))
            del layer.take


def test_a_window_reads_the_difference_of_neighbouring_tokens(written):
    """LLM in a flash, from the model's own activations: what is missed is what the last tokens did not use."""
    _, done = written("zoo:relu")
    with opened(done.folder, limits(done)[2], hot=0.0, window=2, ahead=False) as far:
        seen, missed = [], 0
        first = far.model.decoder.layers[1].fc2
        handle = first.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        reads = []
        take = first.layer.take
        first.layer.take = lambda units: (reads.append(far.sparity_offload.counts.missed), take(units))[1]
        decoded(far)
        handle.remove()
    used = [set((x.reshape(-1, 768) != 0).any(0).nonzero()[:, 0].tolist()) for x in seen]
    missed = sum(len(now - one - two) for two, one, now in zip(used, used[1:], used[2:], strict=False))
    assert len(reads) == len(used) == 17
    assert first.layer.slots.held.tolist() == sorted(used[-1] | used[-2] | used[-3])
    assert missed < sum(map(len, used[2:]))


def test_reading_ahead_stops_where_it_is_in_vain(written):
    _, done = written("zoo:llama", method="cats", sparsity=0.6)
    with opened(done.folder, limits(done)[1], hot=0.0, ahead=True) as far:
        decoded(far)
        counts = far.sparity_offload.counts
        assert 0 < counts.ahead_used <= counts.ahead
        layer = far.sparity_offload.layers[1]
        layer._ahead, layer._ahead_used, before = 1000, 499, counts.ahead
        absent = np.setdiff1d(np.arange(512), layer.slots.held)
        layer.ahead(absent)
        assert counts.ahead == before
        layer._ahead_used = 500
        layer.ahead(absent)
        assert counts.ahead > before


def test_experts_are_read_for_the_tokens_that_need_them(written):
    _, done = written("zoo:moe")
    with opened(done.folder, done.least_bytes, ahead=False) as far:
        decoded(far)
        counts = far.sparity_offload.counts
        assert counts.missed * done.record_bytes == counts.bytes
        assert counts.asked <= 6 * (8 + 2 * 16)  # all experts of a prompt, and two of a token, in 6 layers
        assert far.sparity_offload.layout.staged == 2


def test_it_is_said_what_a_token_must_wait_for(written):
    """The bound is what decoding the calibration text would miss, over the disk's speed."""
    _, done = written("zoo:relu")
    least, middle, _ = limits(done)
    bounds = []
    for memory in (least, middle):
        with opened(done.folder, memory) as far:
            bounds.append(far.sparity_offload.bound)
    assert bounds[0].missed_bytes > bounds[1].missed_bytes
    assert bounds[0].asked_bytes == bounds[1].asked_bytes
    for bound in bounds:
        assert bound.tokens == 54  # half of 3 * 36
        assert bound.seconds == pytest.approx(bound.missed_bytes / bound.speed)
        assert f"{bound.missed_bytes / 1e6:,.2f} MB" in bound.words


def test_a_programme_places_hot_neurons_too(written):
    _, done = written("zoo:relu")
    _, middle, _ = limits(done)
    with opened(done.folder, middle, hot=0.5, place="programme") as far, opened(done.folder, middle, hot=0.5) as other:
        assert torch.equal(decoded(far), decoded(other))
        hot = [sum(map(len, each.sparity_offload.layout.hot)) for each in (far, other)]
        assert hot[0] <= hot[1]


def test_it_cannot_be_copied_or_saved_in_silence(written, tmp_path):
    _, done = written("zoo:relu")
    with opened(done.folder, done.least_bytes) as far:
        for attempt in (lambda: copy.deepcopy(far), lambda: pickle.dumps(far), lambda: far.save_pretrained(tmp_path)):
            with pytest.raises(InvalidInput, match="cannot be copied, pickled or saved"):
                attempt()
    with pytest.raises(sparity.SparityError, match="the model was closed"):
        decoded(far)
    assert list(itertools.chain(tmp_path.iterdir())) == []
