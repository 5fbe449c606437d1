"""Methods for widths against their published formulas, written plainly over a model's own hooks."""

import copy
import math

import pytest
import torch
from structure_models import TOKENS, logits, model_for, varied

import sparity
from families import build, tiny_configs
from sparity.errors import InvalidInput
from sparity.models.cuts.whole import stock_problem

HEAD, GROUPS, CHANNELS, HIDDEN = 8, 2, 64, 32


@pytest.fixture(scope="module")
def model():
    return model_for("flap").requires_grad_(False)


def inputs_of(model, path):
    """What a submodule is given, one sequence at a time: `[samples, tokens, in]`."""
    found = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, given: found.append(given[0][0]))
    for sample in TOKENS:
        logits(model, sample[None])
    hook.remove()
    return torch.stack(found)


def outputs_of(model, path):
    found = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, given, output: found.append(output[0]))
    for sample in TOKENS:
        logits(model, sample[None])
    hook.remove()
    return torch.stack(found)


def test_magnitude_is_the_norm_of_all_that_goes_with_a_part(model):
    found = sparity.structure_scores(model, None, method="magnitude")
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    j = 7
    square = mlp.gate_proj.weight[j].square().sum() + mlp.up_proj.weight[j].square().sum()
    square += mlp.down_proj.weight[:, j].square().sum()
    assert float(found["mlp_channels"][1, j]) == pytest.approx(math.sqrt(square), rel=1e-5)
    rows, queries = slice(HEAD, 2 * HEAD), slice(2 * HEAD, 4 * HEAD)  # the second group: query heads 2 and 3
    square = attention.k_proj.weight[rows].square().sum() + attention.v_proj.weight[rows].square().sum()
    square += attention.q_proj.weight[queries].square().sum() + attention.o_proj.weight[:, queries].square().sum()
    assert float(found["kv_groups"][1, 1]) == pytest.approx(math.sqrt(square), rel=1e-5)
    square = model.model.embed_tokens.weight[:, 3].square().sum() + model.lm_head.weight[:, 3].square().sum()
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 2:
                line = parameter[3] if name.split(".")[1] in ("o_proj", "down_proj") else parameter[:, 3]
                square += line.square().sum()
    assert float(found["hidden_size"][0, 3]) == pytest.approx(math.sqrt(square), rel=1e-5)
    whole = sum(p.square().sum() for p in model.model.layers[2].parameters() if p.ndim == 2)
    assert float(found["depth"][2]) == pytest.approx(math.sqrt(whole), rel=1e-5)


def test_minitron_is_mean_over_tokens_and_l2_over_sequences(model):
    found = sparity.structure_scores(model, TOKENS, method="minitron")
    hidden = inputs_of(model, "model.layers.1.mlp.down_proj")
    channels = hidden.abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(found["mlp_channels"][1], channels, rtol=1e-4, atol=1e-6)
    heads = inputs_of(model, "model.layers.2.self_attn.o_proj").abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(found["query_heads"][2], heads.view(4, HEAD).norm(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["kv_groups"][2], heads.view(2, 2 * HEAD).norm(dim=1), rtol=1e-4, atol=1e-6)
    total = torch.zeros(HIDDEN)
    for index in range(4):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            total += outputs_of(model, f"model.layers.{index}.{norm}").abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(found["hidden_size"][3], total, rtol=1e-4, atol=1e-5)
    kept = sparity.restructure(model, TOKENS, method="minitron", sparsity=0.5, dimension="query_heads")
    assert (kept.config.num_attention_heads, kept.config.num_key_value_heads) == (2, 2)
    best = found["query_heads"][0].view(2, 2).argmax(1)
    rows = torch.cat([torch.arange(HEAD) + HEAD * (2 * g + int(b)) for g, b in enumerate(best)])
    assert torch.equal(
        kept.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight[rows]
    )


def wifv(model, path, reference):
    """Variance of each input times the squared norm of its column, as the paper or as the code has it."""
    x = inputs_of(model, path).double()
    if reference:
        mean, fluctuation = torch.zeros(x.shape[-1]).double(), 0
        for count, sample in enumerate(x):
            mean = mean * count / (count + 1) + sample.mean(0) / (count + 1)
            if count:
                fluctuation = fluctuation * (count - 1) / count + ((sample - mean) ** 2).sum(0) / (count + 1)
    else:
        fluctuation = x.flatten(0, 1).var(0)
    return (fluctuation * model.get_submodule(path).weight.double().square().sum(0)).float(), x.flatten(0, 1).mean(0)


def standardised(metric):
    return (metric - metric.mean()) / metric.std()


@pytest.mark.parametrize("reference", [False, True])
def test_flap_scores_and_chooses_as_published(model, reference):
    found = sparity.structure_scores(model, TOKENS, method="flap", reference=reference)
    heads, channels, means = [], [], []
    for index in range(4):
        metric, mean_heads = wifv(model, f"model.layers.{index}.self_attn.o_proj", reference)
        heads.append(standardised(metric.square()).view(GROUPS, -1).mean(1))
        metric, mean_channels = wifv(model, f"model.layers.{index}.mlp.down_proj", reference)
        channels.append(standardised(metric))
        means.append((mean_heads, mean_channels))
    heads, channels = torch.stack(heads), torch.stack(channels)
    torch.testing.assert_close(found["kv_groups"], heads, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["mlp_channels"], channels, rtol=1e-3, atol=1e-4)
    cost = (16 + 8 + 8 + 16) * HIDDEN / (3 * HIDDEN)
    units = [(float(s), cost, "kv_groups", b, u) for b, row in enumerate(heads) for u, s in enumerate(row)]
    units += [(float(s), 1.0, "mlp_channels", b, u) for b, row in enumerate(channels) for u, s in enumerate(row)]
    units.sort(key=lambda unit: -unit[0])
    total, spent, nearest, threshold = sum(unit[1] for unit in units), 0.0, math.inf, None
    for unit in units:
        spent += unit[1]
        if abs(spent - 0.7 * total) < nearest:
            nearest, threshold = abs(spent - 0.7 * total), unit[0]
    kept = {(name, block, unit) for score, _, name, block, unit in units if score > threshold}
    smaller = sparity.restructure(model, TOKENS, method="flap", sparsity=0.3, reference=reference)
    for index, layer in enumerate(smaller.model.layers):
        left = [unit for unit in range(CHANNELS) if ("mlp_channels", index, unit) in kept]
        dense = model.model.layers[index].mlp
        assert torch.equal(layer.mlp.up_proj.weight, dense.up_proj.weight[left])
        gone = [unit for unit in range(CHANNELS) if unit not in left]
        bias = dense.down_proj.weight[:, gone].double() @ means[index][1][gone]
        torch.testing.assert_close(layer.mlp.down_proj.bias, bias.float(), rtol=1e-4, atol=1e-5)
    assert "the configuration says" in stock_problem(smaller)


def test_flap_of_equal_blocks_is_a_stock_model_with_biases(model):
    smaller = sparity.restructure(model, TOKENS, method="flap", sparsity=0.5, structure="UL-UM")
    assert smaller.config.attention_bias
    assert smaller.config.mlp_bias
    assert smaller.config.num_key_value_heads == 1
    assert stock_problem(smaller) is None
    assert not smaller.model.layers[0].self_attn.q_proj.bias.any()
    qwen = varied(build(tiny_configs()["qwen3"]))
    assert stock_problem(sparity.restructure(qwen, TOKENS, method="flap", sparsity=0.5, structure="UL-UM")) is not None
    with pytest.raises(InvalidInput, match="flap has no rule for experts"):
        sparity.structure_scores(build(tiny_configs()["mixtral"]), TOKENS, method="flap")


def gradients(model):
    """Of the mean loss, and the mean over sequences of the squares of a sequence's, by parameter."""
    model = copy.deepcopy(model).requires_grad_()
    first, second = {}, {}
    for sample in TOKENS:
        model.zero_grad()
        model(sample[None], labels=sample[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            first[name] = first.get(name, 0) + parameter.grad / len(TOKENS)
            second[name] = second.get(name, 0) + parameter.grad.square() / len(TOKENS)
    return first, second


@pytest.mark.parametrize("taylor", ["param_first", "param_second", "param_mix", "vectorize"])
@pytest.mark.parametrize("grouping", ["sum", "max", "second"])
def test_llm_pruner_is_the_taylor_expansion_of_a_group(model, taylor, grouping):
    first, second = gradients(model)
    known = {"taylor": taylor, "grouping": grouping}
    found = sparity.structure_scores(model, TOKENS, method="llm_pruner", **known)
    theirs = sparity.structure_scores(model, TOKENS, method="llm_pruner", reference=True, **known)

    def lines(name, axis):
        weight = model.get_parameter(name)
        salience = weight * first[name]
        if taylor == "param_second":
            salience = weight * second[name] * weight
        elif taylor == "param_mix":
            salience = salience - 0.5 * weight * second[name] * weight
        return salience.sum(axis).abs() if taylor == "vectorize" else salience.abs().sum(axis)

    def joined(parts):
        if grouping == "sum":
            return sum(parts)
        return torch.stack(parts).max(0).values if grouping == "max" else parts[1]

    path = "model.layers.2."
    gate, up = lines(f"{path}mlp.gate_proj.weight", 1), lines(f"{path}mlp.up_proj.weight", 1)
    channels = joined([gate, up, lines(f"{path}mlp.down_proj.weight", 0)])
    torch.testing.assert_close(found["mlp_channels"][2], channels.detach(), rtol=1e-3, atol=1e-6)
    queries, out = lines(f"{path}self_attn.q_proj.weight", 1), lines(f"{path}self_attn.o_proj.weight", 0)
    keys, values = lines(f"{path}self_attn.k_proj.weight", 1), lines(f"{path}self_attn.v_proj.weight", 1)

    def own(line):  # query head h shares the keys of group h // 2
        return torch.cat([line[16 * g : 16 * g + 8] + line[16 * g + 8 : 16 * g + 16] for g in range(2)])

    def folded(line):  # the code: row i goes to row i mod 16
        return line[:16] + line[16:]

    for scores, fold in ((found, own), (theirs, folded)):
        heads = joined([keys, fold(queries), values, fold(out)]).view(2, HEAD).sum(1)
        torch.testing.assert_close(scores["kv_groups"][2], heads.detach(), rtol=1e-3, atol=1e-6)


def test_llm_pruner_spares_the_first_and_last_blocks(model):
    for sparsity, width, keys in ((0.3, 44, 16), (0.5, 32, 8), (0.6, 25, 8)):  # int(64 * 0.7); 16 - int(16 * 0.7) = 5
        kept = {"keep_first": 1, "keep_last": 1}
        smaller = sparity.restructure(model, TOKENS, method="llm_pruner", sparsity=sparsity, **kept)
        widths = [layer.mlp.down_proj.weight.shape[1] for layer in smaller.model.layers]
        assert widths == [64, width, width, 64]
        rows = [layer.self_attn.k_proj.weight.shape[0] for layer in smaller.model.layers]
        assert rows == [16, keys, keys, 16]  # a head of 8 rows goes where 8 rows would


def loss(model, tokens):
    with torch.no_grad():
        return float(model(tokens, labels=tokens, use_cache=False).loss)


def test_two_ssp_narrows_the_mlps_and_silences_attentions_greedily(model):
    found = sparity.structure_scores(model, TOKENS, method="two_ssp")
    channels = inputs_of(model, "model.layers.1.mlp.down_proj").norm(dim=1).mean(0)
    torch.testing.assert_close(found["mlp_channels"][1], channels, rtol=1e-4, atol=1e-6)
    mlp, attention, sparsity, balance = 3 * 32 * 64, 2 * 32 * 32 + 2 * 16 * 32, 0.5, 1.0
    silent = round(4 * sparsity ** (mlp / attention / balance))
    removed = int((sparsity * 4 * (mlp + attention) - silent * attention) / (4 * mlp / 64))
    smaller = sparity.restructure(model, TOKENS, method="two_ssp", sparsity=sparsity, balance=balance)
    assert (silent, smaller.config.intermediate_size) == (1, 64 - removed)
    narrow = sparity.cut(
        model, {"mlp_channels": [row.topk(64 - removed).indices.sort().values for row in found["mlp_channels"]]}
    )
    losses = [
        loss(sparity.cut(narrow, {"attention": [b for b in range(4) if b != gone]}), TOKENS[:1]) for gone in range(4)
    ]
    gone = losses.index(min(losses))
    assert [not layer.self_attn.o_proj.weight.any() for layer in smaller.model.layers] == [b == gone for b in range(4)]
    for index in range(4):
        without = sparity.cut(model, {"attention": [b for b in range(4) if b != index]})
        assert float(found["attention"][index]) == pytest.approx(loss(without, TOKENS[:1]), rel=1e-4)
