import pytest
import torch

from sparity.calibration import walk
from sparity.models import Decoder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
TOKENS = torch.arange(5 * 20).reshape(5, 20) % 97


def hidden_states(model, tokens):
    """What transformers itself feeds to each block, and the last block's output before the final norm."""
    seen = []
    path = "transformer.h" if model.config.model_type == "gpt2" else "model.layers"
    blocks = model.get_submodule(path)
    hooks = [block.register_forward_pre_hook(lambda _, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True) for block in blocks]  # fmt: skip
    hooks.append(
        blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_block_sees_what_the_model_feeds_it(family_models, family, batch):
    model = family_models[family]
    expected = hidden_states(model, TOKENS)
    decoder = Decoder.open(model)
    inputs = decoder.inputs(TOKENS, batch)
    assert len(decoder) == 3
    for step in walk(decoder, inputs, ["mean"]):
        torch.testing.assert_close(step.hidden, expected[step.block.index], rtol=1e-5, atol=1e-5)
        list(step.sites())
    torch.testing.assert_close(step.hidden, expected[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_projections_inputs(family_models, family):
    model = family_models[family]
    decoder = Decoder.open(model)
    grams = {}
    for step in walk(decoder, decoder.inputs(TOKENS, 2), ["gram"]):
        for site, statistics in step.sites():
            assert (statistics.sequences, statistics.tokens) == (5, 100)
            for projection in site.projections:
                grams[projection.name] = statistics.gram
    seen = {}
    modules = {name: module for name, module in model.named_modules() if name in grams or f"{name}.q" in grams}

    def watch(name):
        def hook(_, arguments):
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            seen[name] = x.T @ x

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, gram in grams.items():
        expected = seen[name if name in seen else name.rpartition(".")[0]]
        torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-4)


def zero_first_site(order, true_sequential, model):
    """Zero every block's first site on the way; collect the norms of all later sites."""
    decoder = Decoder.open(model)
    norms = []
    for step in walk(decoder, decoder.inputs(TOKENS), ["column_norm"], order=order, true_sequential=true_sequential):
        for number, (site, statistics) in enumerate(step.sites()):
            norms.append(statistics.column_norm)
            if number == 0:
                for projection in site.projections:
                    projection.write(torch.zeros_like(projection.weight))
    return norms


def test_orders_differ_in_what_the_statistics_have_seen(family_models):
    model = family_models["llama"]
    decoder = Decoder.open(model)
    untouched = [
        statistics.column_norm
        for step in walk(decoder, decoder.inputs(TOKENS), ["column_norm"])
        for _, statistics in step.sites()
    ]
    independent = zero_first_site("independent", False, model)
    sequential = zero_first_site("sequential", False, model)
    true_sequential = zero_first_site("sequential", True, model)
    assert all(torch.equal(a, b) for a, b in zip(untouched, independent, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(untouched[:4], sequential[:4], strict=True))  # first block: dense
    assert not torch.equal(untouched[4], sequential[4])  # second block: behind the zeroed first
    assert torch.equal(untouched[0], true_sequential[0])
    assert (true_sequential[1] == 0).all()  # the input of o behind zeroed q, k and v


def test_the_model_in_memory_is_not_changed(family_models):
    model = family_models["gpt2"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero_first_site("sequential", False, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
