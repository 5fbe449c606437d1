"""Rounds of training a block between two prunings: by hand, against the published steps, never worse on text apart."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import references
import sparity
from families import tiny_configs
from sparity.calibration.evidence import LiveSequential
from sparity.calibration.walk import Visit, walk
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Block, BlockInputs, Decoder, InputSite, Projection
from sparity.recipe import Recipe
from sparity.static.prune.rounds import Rounds, judges
from sparity.static.prune.stage import Prune

TOKENS = torch.arange(8 * 12).reshape(8, 12) * 7 % 97
DENSE = torch.tensor([[4.0, 1.0], [1.0, 4.0]])


def one_matrix(*sequences):
    """The evidence of a block that is one matrix [2, 2], with sequences of one token each."""
    module = nn.Linear(2, 2, bias=False).requires_grad_(False)
    module.weight.data = DENSE.clone()
    site = InputSite("here", (Projection("here", "up", module),))
    hidden = torch.tensor(sequences)[:, None]  # [samples, 1, 2]
    inputs = BlockInputs(hidden, {1: [{}]}, 1)
    return LiveSequential(frozenset()).for_block(Visit(Block(0, "block", module, (site,)), inputs, hidden, hidden))


def pruned_in_rounds(evidence, **rounds):
    stage = Prune(score="magnitude", compare_within="row", rounds=Rounds(**rounds))
    return stage.edit(None, evidence, {"sparsity": {"here": 0.5}})


def test_a_step_by_hand():
    """Outputs are 4, not 5, every slope is -2, and RMSprop's first step is ten times the rate against its sign."""
    evidence = one_matrix([1.0, 1.0], [1.0, 1.0])
    edit = pruned_in_rounds(evidence, count=1, rate=0.01, samples=1)
    torch.testing.assert_close(evidence.block.module.weight, 4.1 * torch.eye(2))
    assert not edit.notes
    assert edit.changes[0].zeros == 0.5


def test_what_does_not_help_on_the_sequences_that_judge_is_put_back():
    """For (1, -1) the pruned outputs are too far out already, and the same step drives them further."""
    evidence = one_matrix([1.0, 1.0], [1.0, -1.0])
    edit = pruned_in_rounds(evidence, count=1, rate=0.01, samples=1)
    assert torch.equal(evidence.block.module.weight, 4 * torch.eye(2))
    assert edit.notes == ("block: rounds leave its output no nearer to the dense one (1.556, not 1.414): put back",)


def test_the_last_fourth_judges():
    assert [judges(count) for count in (2, 3, 4, 7, 8, 128)] == [1, 1, 1, 1, 2, 32]


def opened(model, tokens=TOKENS):
    decoder = Decoder.open(copy.deepcopy(model))
    return decoder, decoder.inputs(tokens, 1)


def own(decoder, block):
    module = copy.deepcopy(block.module)
    return Block(block.index, block.name, module, decoder.family.sites(module, block.name, decoder.config))


def prune(model, stage, tokens=TOKENS, losses=None):
    """Prune a whole model; of each block a copy before, itself, and its inputs."""
    decoder, inputs = opened(model, tokens)
    decision, found = stage.decide(decoder, None), []
    source = LiveSequential(stage.needs().statistics | ({"gram"} if losses is not None else set()))
    for visit in walk(decoder, inputs):
        dense, hidden = copy.deepcopy(visit.block.module), visit.hidden.clone()
        edit = stage.edit(decoder, source.for_block(visit, losses), decision)
        block = own(decoder, visit.block)  # the visit's is released
        found.append(SimpleNamespace(dense=dense, block=block, hidden=hidden, inputs=inputs, edit=edit))
    return found


def error(one, module):
    """Mean over the last two sequences and their tokens of the distance between the outputs."""
    block, found = one.block, []
    for hidden in one.hidden[-2:, None]:
        outputs = [Block(block.index, "", each, ()).output(one.inputs, hidden) for each in (one.dense, module)]
        found.append((outputs[0] - outputs[1]).norm(dim=-1).mean())
    return float(sum(found) / 2)


@pytest.mark.parametrize("family", tuple(tiny_configs()))
@pytest.mark.parametrize(("options", "rate"), [({"pattern": "2:4"}, 1e-3), ({"score": "wanda_plus_plus"}, 0.05)])
def test_no_block_is_further_from_the_dense_one_on_text_apart_and_the_pattern_is_exact(
    family_models, family, options, rate
):
    plain = Prune(unseen_expert="dense", **options)
    rounds = plain.model_copy(update={"rounds": Rounds(count=2, rate=rate, samples=3)})
    pruned = prune(family_models[family], rounds)
    first, once = pruned[0], prune(family_models[family], plain)[0]
    assert error(first, first.block.module) <= error(first, once.block.module)
    for one in pruned:
        decision = {"sparsity": {projection.name: 0.5 for projection in one.block.projections}}
        assert rounds.verify(one.block, decision) == []
        assert not any(parameter.requires_grad for parameter in one.block.module.parameters())
        for projection in one.block.projections:
            if "score" in options and projection.expert is None:
                assert (projection.weight == 0).sum(1).tolist() == [projection.weight.shape[1] // 2] * len(
                    projection.weight
                )


def published(module, call, inputs, names, rounds):
    """The steps as the paper has them, on plain modules: score, zero, RMSprop sequence by sequence, score, zero."""

    def gradients():
        squares = dict.fromkeys(names, 0.0)
        for x in inputs:
            module.zero_grad()
            call(module, x).norm().backward()
            for name in names:
                squares[name] = squares[name] + module.get_parameter(name).grad.square() / len(inputs)
        module.zero_grad()
        return {name: square.sqrt() for name, square in squares.items()}

    def zero(known):
        seen = {name: [] for name in names}
        hooks = [
            module.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, arguments, name=name: seen[name].append(arguments[0].detach())
            )
            for name in names
        ]
        with torch.no_grad():
            for x in inputs:
                call(module, x)
            for hook in hooks:
                hook.remove()
            for name in names:
                weight = module.get_parameter(name)
                metric = weight.abs() * (100 * known[name] + references.input_norm(torch.cat(seen[name])).float())
                order = metric.sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
                weight.scatter_(1, order, 0.0)

    dense, known = copy.deepcopy(module), gradients()
    optimiser = torch.optim.RMSprop([module.get_parameter(name) for name in names], lr=rounds.rate)
    learned = inputs[: len(inputs) * 3 // 4]
    for number in range(rounds.count):
        places = torch.randperm(len(learned), generator=torch.Generator().manual_seed(number))[: rounds.samples]
        zero(known)
        for place in places:
            optimiser.zero_grad()
            ((call(module, learned[place]) - call(dense, learned[place]).detach()) ** 2).sum().backward()
            optimiser.step()
    zero(gradients())


@pytest.mark.parametrize("rate", [3e-7, 1e-3])
def test_equal_to_the_published_steps(family_models, rate):
    rounds = Rounds(count=3, rate=rate, samples=4)
    one = prune(family_models["llama"], Prune(score="wanda_plus_plus", rounds=rounds))[0]
    module = one.dense.requires_grad_(True)
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 2]
    arguments = one.inputs.arguments[1][0]

    def call(module, x):
        output = module(x[None], **arguments)
        return output[0] if isinstance(output, tuple) else output

    published(module, call, list(one.hidden), names, rounds)
    assert not one.edit.notes  # not put back
    for name in names:
        torch.testing.assert_close(
            one.block.module.get_parameter(name), module.get_parameter(name), rtol=1e-4, atol=1e-6
        )


def test_twice_the_same_bits_and_zeros_of_an_earlier_stage_stay(family_models):
    model = copy.deepcopy(family_models["llama"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter[::3, ::2] = 0.0
    decoder, inputs = opened(model)
    stage = Prune(score="wanda", sparsity=0.4, rounds=Rounds(count=2, rate=1e-4, samples=4))
    decision, found = stage.decide(decoder, None), []
    for _ in range(2):
        decoder, inputs = opened(model)
        walking = walk(decoder, inputs)
        visit = next(walking)
        evidence = LiveSequential(stage.needs().statistics).for_block(visit)
        evidence.masks = {each.name: each.weight != 0 for each in visit.block.projections}
        assert not stage.edit(decoder, evidence, decision).notes
        for projection in visit.block.projections:
            assert not projection.weight[~evidence.masks[projection.name]].any()
        found.append(copy.deepcopy(visit.block.module.state_dict()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_model_of_16_bits_is_trained_in_float32_and_keeps_its_type(family_models):
    model = copy.deepcopy(family_models["llama"]).bfloat16()
    one = prune(model, Prune(score="wanda_plus_plus", rounds=Rounds(count=2, rate=1e-4, samples=4)))[0]
    assert {parameter.dtype for parameter in one.block.module.parameters()} == {torch.bfloat16}
    assert not one.edit.notes
    kept = one.block.projections[0].weight != 0
    dense = one.dense.get_parameter("self_attn.q_proj.weight")
    assert (one.block.projections[0].weight[kept] != dense[kept]).float().mean() > 0.5


def test_losses_are_those_of_the_weights_that_were_kept(family_models):
    losses = {}
    stage = Prune(score="wanda", rounds=Rounds(count=2, rate=1e-4, samples=4))
    one = prune(family_models["llama"], stage, losses=losses)[0]
    assert not one.edit.notes
    seen, q = [], one.dense.self_attn.q_proj
    handle = q.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].reshape(-1, q.in_features)))
    for hidden in one.hidden[:, None]:
        Block(0, "", one.dense, ()).output(one.inputs, hidden)
    handle.remove()
    x, after = torch.cat(seen), one.block.projections[0].weight
    expected = (x @ (q.weight - after).T).square().sum() / (x @ q.weight.T).square().sum()
    assert losses["model.layers.0.self_attn.q_proj"] == pytest.approx(float(expected), rel=1e-4)


def test_a_run_in_rounds_and_one_whose_blocks_stay_dense(family_models, token_files, tmp_path):
    recipe = {
        "calibration": {"tokens": token_files["calibration"], "batch": 2},
        "stages": [{"prune": {"score": "magnitude", "rounds": {"count": 1, "rate": 1e-3, "samples": 2}}}],
        "measure": {"speed": None},
    }
    result = sparity.run(recipe, model=family_models["llama"], output=tmp_path / "out", device="cpu")
    assert result.report.candidates[0].sparsity == pytest.approx(0.5, abs=0.02)
    dense = Prune(sparsity=0.0, rounds=Rounds())
    for one in prune(family_models["llama"], dense):
        assert all(
            torch.equal(a, b) for a, b in zip(one.dense.parameters(), one.block.module.parameters(), strict=True)
        )


def test_what_cannot_be_is_refused(family_models):
    with pytest.raises(InvalidInput, match="rounds need `order: sequential`"):
        prune(family_models["llama"], Prune(order="independent", rounds=Rounds()))
    with pytest.raises(InvalidInput, match="judged by others: give 2 samples or more"):
        prune(family_models["llama"], Prune(rounds=Rounds()), TOKENS[:1])
    with pytest.raises(NumericalError, match=r"model\.layers\.0: the loss of round 1 is nan: lower its rate"):
        prune(family_models["llama"], Prune(rounds=Rounds(count=2, rate=1e30)))
    for wrong in ({"count": 0}, {"rate": 0.0}, {"samples": 0}, {"steps": 3}):
        with pytest.raises(InvalidInput, match="rounds"):
            Recipe.read({"model": "zoo:llama", "stages": [{"prune": {"rounds": wrong}}]})
