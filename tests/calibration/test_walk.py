import pytest
import torch

from families import tiny_configs
from sparity.calibration import walk
from sparity.calibration.evidence import LiveIndependent, LiveSequential
from sparity.models import Decoder

FAMILIES = tuple(tiny_configs())
MIXTURES = ("mixtral", "qwen3_moe")
NORMS = frozenset({"column_norm"})
TOKENS = torch.arange(5 * 20).reshape(5, 20) % 97


def hidden_states(model, tokens):
    """What transformers itself feeds to each block, and the last block's output before the final norm."""
    seen = []

    def before(_, arguments, named):
        seen.append(arguments[0] if arguments else named["hidden_states"])

    def after(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    blocks = model.get_submodule(Decoder.open(model).family.blocks)
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def sites_of(visit, *needs):
    """Every input site with its statistics, after the edits so far."""
    return LiveSequential(frozenset(needs)).for_block(visit).sites()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_block_sees_what_the_model_feeds_it(family_models, family, batch):
    model = family_models[family]
    expected = hidden_states(model, TOKENS)
    decoder = Decoder.open(model)
    inputs = decoder.inputs(TOKENS, batch)
    assert len(decoder) == 3
    for visit in walk(decoder, inputs):
        torch.testing.assert_close(visit.hidden, expected[visit.block.index], rtol=1e-5, atol=1e-5)
        list(sites_of(visit, "mean"))
    torch.testing.assert_close(visit.hidden, expected[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
def test_statistics_are_those_of_the_projections_inputs(family_models, family):
    model = family_models[family]
    decoder = Decoder.open(model)
    grams, modules = {}, {}
    for visit in walk(decoder, decoder.inputs(TOKENS, 2)):
        sites = decoder.family.sites(model.get_submodule(visit.block.name), visit.block.name, model.config)
        for (site, statistics), original in zip(sites_of(visit, "gram"), sites, strict=True):
            assert (statistics.sequences, statistics.tokens) == (5, 100)
            grams[site.name] = statistics.gram
            modules[site.name] = original.projections[-1].module
    for name, gram in grams.items():
        seen = []
        hook = modules[name].register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        with torch.no_grad():
            model(TOKENS, use_cache=False)
        hook.remove()
        x = seen[0].reshape(-1, seen[0].shape[-1])
        torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_sees_the_tokens_that_are_routed_to_it(family_models, family):
    model = family_models[family]
    decoder = Decoder.open(model)
    counts = {}
    for visit in walk(decoder, decoder.inputs(TOKENS, 5)):
        routed = []
        experts = getattr(model.get_submodule(visit.block.name).mlp, "experts", None)
        if experts is None:
            continue
        hook = experts.register_forward_pre_hook(lambda _, arguments, routed=routed: routed.append(arguments))
        with torch.no_grad():
            model(TOKENS, use_cache=False)
        hook.remove()
        hidden, chosen = routed[0][:2]
        for site, statistics in sites_of(visit, "gram", "mean"):
            expert = site.projections[0].expert
            if expert is None:
                continue
            x = torch.stack([row for row, picks in zip(hidden, chosen.tolist(), strict=True) if expert in picks])
            if site.projections[0].role == "down":
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
                x = torch.nn.functional.silu(gate) * up
            assert (statistics.sequences, statistics.tokens) == (5, len(x))
            torch.testing.assert_close(statistics.gram, x.T @ x, rtol=1e-3, atol=1e-3)
            counts[site.name] = len(x)
    experts_seen = sum(count for name, count in counts.items() if name.endswith("gate_up"))
    blocks = 3 if family == "mixtral" else 2
    assert experts_seen == blocks * 100 * 2  # every token goes to two experts


def zero_first_site(evidence, model):
    """Zero every block's first site on the way; collect the norms of all later sites."""
    decoder = Decoder.open(model)
    norms = []
    for visit in walk(decoder, decoder.inputs(TOKENS)):
        for number, (site, statistics) in enumerate(evidence.for_block(visit).sites()):
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
        for visit in walk(decoder, decoder.inputs(TOKENS))
        for _, statistics in sites_of(visit, "column_norm")
    ]
    independent = zero_first_site(LiveIndependent(NORMS), model)
    sequential = zero_first_site(LiveSequential(NORMS), model)
    true_sequential = zero_first_site(LiveSequential(NORMS, true_sequential=True), model)
    assert all(torch.equal(a, b) for a, b in zip(untouched, independent, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(untouched[:4], sequential[:4], strict=True))  # first block: dense
    assert not torch.equal(untouched[4], sequential[4])  # second block: after the zeroed first
    assert torch.equal(untouched[0], true_sequential[0])
    assert (true_sequential[1] == 0).all()  # the input of o after zeroed q, k and v


def test_the_model_in_memory_is_not_changed(family_models):
    model = family_models["gpt2"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero_first_site(LiveSequential(NORMS), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
