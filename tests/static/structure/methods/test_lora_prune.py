"""LoRAPrune against its formulas, by hand, by autograd, and as one plain loop over a model's own linear layers."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_models import TOKENS, check_types_and_gradients_stay, logits, model_for, varied

import sparity
from families import build, tiny_configs
from sparity.errors import InvalidInput
from sparity.models import Decoder, Projection
from sparity.models.dimensions import Cut, Dimension
from sparity.static.structure.low_rank_importance import Group, cubic_sparsity
from sparity.static.structure.low_ranks import low_ranks, merged_gradient, order_by_norm
from sparity.static.structure.methods.lora_prune import LoRAPrune
from sparity.static.structure.subject import Subject

HEAD, SCALE = 8, 2.0
ALIKE = {"keep_first": 0, "keep_last": 0}
ROWS = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "gate_proj": 1, "up_proj": 1}  # of a unit, in a tiny Llama
COLUMNS = {"o_proj": 16, "down_proj": 1}


@pytest.fixture(scope="module")
def model():
    return model_for("lora_prune")


def test_the_gradient_by_hand_and_by_autograd():
    slope = torch.tensor([[1.0, 0], [3, 1]])  # of the merged weight
    first = torch.tensor([[1.0, 2]], requires_grad=True)
    second = torch.tensor([[1.0], [-1]], requires_grad=True)
    merged = torch.zeros(2, 2) + second @ first
    (slope * merged).sum().backward()
    assert second.grad.tolist() == [[1], [5]]  # G A^T
    assert first.grad.tolist() == [[-2, -1]]  # B^T G
    found = merged_gradient(first, second, first.grad, second.grad)
    # dB A = [[1, 2], [5, 10]], and (B - dB) dA = [[0], [-6]] [[-2, -1]]
    assert found.tolist() == [[1, 2], [17, 16]]
    after = (second - second.grad) @ (first - first.grad)
    assert torch.equal(found, merged - after)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_with_an_orthogonal_a_of_full_rank_and_b_at_zero_it_is_the_gradient_itself(rows, columns, seed):
    drawn = torch.Generator().manual_seed(seed)
    slope = torch.randn(rows, columns, generator=drawn, dtype=torch.float64)
    first = torch.linalg.qr(torch.randn(columns, columns, generator=drawn, dtype=torch.float64)).Q
    second = torch.zeros(rows, columns, dtype=torch.float64)
    found = merged_gradient(first, second, second.T @ slope, slope @ first.T)
    torch.testing.assert_close(found, slope)


def test_the_sparsity_grows_along_a_cubic_between_the_ends():
    found = [cubic_sparsity(step, 20, 0.5, 0.1, 0.1) for step in (0, 2, 6, 10, 14, 18, 19)]
    assert found == pytest.approx([0, 0, 0.5 * 37 / 64, 0.5 * 7 / 8, 0.5 * 63 / 64, 0.5, 0.5])
    assert cubic_sparsity(0, 1, 0.5, 0.1, 0.1) == 0.5  # the last step, at the latest
    assert cubic_sparsity(9, 10, 0.5, 0.0, 0.0) == 0.5


@given(st.integers(1, 60), st.floats(0, 0.5), st.floats(0, 0.49), st.floats(0.01, 0.99))
def test_what_is_gone_never_falls(steps, warmup, cooldown, sparsity):
    shares = [cubic_sparsity(step, steps, sparsity, warmup, cooldown) for step in range(steps)]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == sparsity


def test_a_units_importance_has_norm_one_in_each_projection_and_is_averaged_over_steps():
    group = Group(0, Dimension("mlp_channels", 2, (Cut("up", "rows", 1), Cut("down", "columns", 1))))
    seen = {"up": torch.tensor([[3.0, 0], [2, 2]]), "down": torch.tensor([[1.0, 0], [1, 0]])}
    group.observe(seen, 0.9)  # (3, 4) / 5 and (2, 0) / 2
    assert group.average.tolist() == pytest.approx([0.16, 0.08])
    group.observe({name: torch.zeros(2, 2) for name in seen}, 0.9)
    assert group.average.tolist() == pytest.approx([0.144, 0.072])
    wide = Group(0, Dimension("kv_groups", 2, (Cut("up", "rows", 2),)))
    wide.observe({"up": torch.tensor([[1.0], [2], [4], [0]])}, 0.0)
    assert wide.average.tolist() == pytest.approx([0.6, 0.8])


def test_what_is_gone_is_zero_and_does_not_come_back():
    linear = torch.nn.Linear(2, 6, bias=False).requires_grad_(False)
    with low_ranks([Projection("up", "up", linear)], 1, SCALE, 0) as adapted:
        adapted["up"].layer.second.data.fill_(1.0)
        group = Group(0, Dimension("heads", 3, (Cut("up", "rows", 2),)))
        group.average = torch.tensor([2.0, 1, 3])
        group.keep(2, adapted)
        assert group.stays.tolist() == [True, False, True]
        group.average = torch.tensor([2.0, 9, 3])
        group.keep(2, adapted)
        assert group.stays.tolist() == [True, False, True]
        group.keep(1, adapted)
        assert group.stays.tolist() == [False, False, True]
        assert linear.weight.any(1).tolist() == [False] * 4 + [True] * 2
    assert linear.weight.any(1).tolist() == [False] * 4 + [True] * 2


def test_a_goes_with_the_norms_of_columns():
    first = torch.tensor([[1.0, 2, 3]])
    order_by_norm(first, torch.tensor([[5.0, 0, 1], [0, 0, 1]]))
    assert first.tolist() == [[3, 1, 2]]  # the smallest column is given the first number
    experts = torch.tensor([[[1.0, 2]], [[3.0, 4]]])
    order_by_norm(experts, torch.tensor([[[2.0, 1]], [[1.0, 2]]]))
    assert experts.tolist() == [[[2, 1]], [[3, 4]]]


def published(model, options, sparsity, cut):
    """The published loop: masks on the outputs of q, k, v, gate and up; the merged model, and the masks of units."""
    model = copy.deepcopy(model).requires_grad_(False)
    drawn = torch.Generator().manual_seed(0)
    linears = {name: layer for name, layer in model.named_modules() if ".layers." in name and hasattr(layer, "weight")}
    linears = {name: layer for name, layer in linears.items() if layer.weight.ndim == 2}
    low, masks, averages = {}, {}, {}
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        first = torch.randn(options["rank"], columns, generator=drawn) / columns**0.5
        ordered = torch.empty_like(first)
        ordered[:, linear.weight.double().norm(dim=0).argsort()] = first
        low[name] = ordered.requires_grad_(), torch.zeros(rows, options["rank"]).requires_grad_()
        units = 2 if "self_attn" in name else 64
        owner = name.rpartition(".")[0]
        averages[owner], masks[owner] = torch.zeros(units), torch.ones(units)

        def forward(module, given, output, name=name, owner=owner):
            first, second = low[name]
            output = output + SCALE * given[0] @ first.T @ second.T
            wide = ROWS.get(name.rpartition(".")[2])
            return output * masks[owner].repeat_interleave(wide) if wide else output

        linear.register_forward_hook(forward)
    steps, batch = options["steps"], options["batch"]
    optimiser = torch.optim.AdamW([part for pair in low.values() for part in pair], options["rate"], weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = options["rate"] * (1 + math.cos(math.pi * step / steps)) / 2
        ids = TOKENS[torch.arange(step * batch, (step + 1) * batch) % len(TOKENS)]
        optimiser.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        found = {owner: torch.zeros_like(average) for owner, average in averages.items()}
        for name, (first, second) in low.items():
            slope = second.grad @ first + second @ first.grad - second.grad @ first.grad
            one = (slope * (linears[name].weight + SCALE * second @ first)).abs().detach()
            kind = name.rpartition(".")[2]
            lines = one.sum(0).view(-1, COLUMNS[kind]) if kind in COLUMNS else one.sum(1).view(-1, ROWS[kind])
            found[name.rpartition(".")[0]] += lines.sum(1) / lines.sum(1).norm()
        gone = cubic_sparsity(step, steps, sparsity, options["warmup"], options["cooldown"])
        for owner, average in averages.items():
            averages[owner] = 0.9 * average + 0.1 * found[owner]
            if int(owner.split(".")[2]) in cut and gone and (step % options["every"] == 0 or gone == sparsity):
                lowest = (averages[owner] * masks[owner]).argsort(stable=True)[: int(gone * len(average))]
                masks[owner][lowest] = 0
        optimiser.step()
    for name, (first, second) in low.items():
        linears[name].weight.data += SCALE * (second @ first).detach()
    return model, masks


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_it_is_the_published_loop(model, sparsity):
    options = {"steps": 10, "rate": 1e-2, "batch": 2, "rank": 3, "every": 3, "warmup": 0.1, "cooldown": 0.2}
    expected, masks = published(model, options, sparsity, range(1, 3))
    method = LoRAPrune(keep_first=1, keep_last=1, alpha=3 * SCALE, **options)
    found = method.restructure(Subject(model, TOKENS), sparsity)
    for index, layer in enumerate(found.model.model.layers):
        dense = expected.model.layers[index]
        channels = masks[f"model.layers.{index}.mlp"].nonzero().flatten()
        heads = masks[f"model.layers.{index}.self_attn"].nonzero().flatten()
        kept = {name: rows[index] for name, rows in found.kept.items()}
        if index in (1, 2):
            assert (len(channels), len(heads)) == (64 - int(64 * sparsity), 2 - int(2 * sparsity))
            assert kept == {"mlp_channels": channels.tolist(), "kv_groups": heads.tolist()}
        else:
            assert (len(channels), len(heads)) == (64, 2)
            assert kept == {"mlp_channels": None, "kv_groups": None}
        queries = (heads[:, None] * 16 + torch.arange(16)).flatten()
        keys = (heads[:, None] * HEAD + torch.arange(HEAD)).flatten()
        for part, theirs in (
            (layer.mlp.gate_proj, dense.mlp.gate_proj.weight[channels]),
            (layer.mlp.down_proj, dense.mlp.down_proj.weight[:, channels]),
            (layer.self_attn.q_proj, dense.self_attn.q_proj.weight[queries]),
            (layer.self_attn.v_proj, dense.self_attn.v_proj.weight[keys]),
            (layer.self_attn.o_proj, dense.self_attn.o_proj.weight[:, queries]),
        ):
            torch.testing.assert_close(part.weight, theirs, rtol=1e-3, atol=1e-4)


def biased():
    """A Llama with biases, none of them zero."""
    config = copy.deepcopy(tiny_configs()["llama"])
    config.attention_bias = config.mlp_bias = True
    model, drawn = build(config), torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=drawn) / 4
    return model


@pytest.mark.parametrize(
    ("family", "sparsity"),
    [
        *(("llama", 0.5), ("biased", 0.5), ("qwen3", 0.5), ("mixtral", 0.5)),
        *(("qwen2", 0.2), ("phi3", 0.2), ("gpt_neox", 0.2), ("gpt2", 0.2), ("opt", 0.2)),  # channels alone
    ],
)
def test_the_cut_model_computes_what_the_trained_one_does_with_the_same_parts_at_zero(family, sparsity):
    dense = biased() if family == "biased" else varied(build(tiny_configs()[family]))
    method, subject = LoRAPrune(**ALIKE, steps=3, batch=1, rate=1e-2), Subject(dense, TOKENS)
    trained = copy.deepcopy(dense)
    groups = method.train(subject, trained, sparsity, range(subject.depth))
    smaller = method.restructure(subject, sparsity)
    for group in groups:
        assert smaller.kept[group.dimension.name][group.block] == group.stays.nonzero().flatten().tolist()
        assert int((~group.stays).sum()) == int(group.dimension.size * sparsity)
    torch.testing.assert_close(logits(smaller.model), logits(trained), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(trained), logits(dense), rtol=1e-2, atol=1e-2)
    assert smaller.model.num_parameters() < dense.num_parameters()


def test_heads_of_a_width_that_the_configuration_cannot_say_are_refused_before_the_training(monkeypatch):
    monkeypatch.delattr(LoRAPrune, "train")
    with pytest.raises(InvalidInput, match="cannot say how wide a head is"):
        sparity.restructure(build(tiny_configs()["opt"]), TOKENS, method="lora_prune", sparsity=0.5)


def test_the_last_block_and_a_tenth_at_the_beginning_stay_whole(model):
    smaller = sparity.restructure(model, TOKENS, method="lora_prune", sparsity=0.5, steps=2)
    assert [layer.mlp.down_proj.weight.shape[1] for layer in smaller.model.layers] == [32, 32, 32, 64]
    assert LoRAPrune().cut_blocks(32) == range(3, 31)
    with pytest.raises(InvalidInput, match="lora_prune spares the first and last blocks"):
        LoRAPrune().sizes(Decoder.open(model), 0.5)


def test_the_seed_decides_and_types_and_gradients_are_the_models_own(model):
    options = {"method": "lora_prune", "sparsity": 0.5, "steps": 2, **ALIKE}
    one, two = (sparity.restructure(model, TOKENS, seed=seed, **options) for seed in (0, 1))
    assert not torch.equal(logits(one), logits(two))
    check_types_and_gradients_stay(model, lambda half: sparity.restructure(half, TOKENS, **options))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": 0}, "`steps` must be 1 or more, not 0"),
        ({"every": 0}, "`every` must be 1 or more"),
        ({"rate": 0.0}, "`rate` and `alpha` must be positive, not 0, 16"),
        ({"alpha": math.inf}, "`rate` and `alpha` must be positive"),
        ({"decay": 1.0}, r"`decay` must lie in \[0, 1\), not 1"),
        ({"warmup": 0.5, "cooldown": 0.5}, "some must be left between them"),
        ({"warmup": -0.1}, "some must be left between them"),
        ({"keep_first": 3, "keep_last": 2, "steps": 1}, "lora_prune cannot spare 3 and 2 of 4 blocks"),
    ],
)
def test_what_it_cannot_do_is_refused(model, wrong, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        sparity.restructure(model, TOKENS, method="lora_prune", sparsity=0.5, **wrong)


def test_sequences_of_two_tokens_are_refused(model):
    with pytest.raises(InvalidInput, match="at least 3 tokens"):
        sparity.structure_scores(model, TOKENS[:, :2], method="lora_prune")
