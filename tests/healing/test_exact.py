"""The mathematics of healing against formulas written plainly."""

import copy
import math

import pytest
import torch
from healing_tasks import IDS, drawn, run_method, sparse_of, task_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity import registry
from sparity.errors import InvalidInput
from sparity.healing.heal.guard import apart
from sparity.healing.heal.submodules import submodules
from sparity.healing.heal.sums import Sums, fitted
from sparity.healing.heal.teacher import STATE, TopK, cosine_distance
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.quality.agreement import compare
from sparity.training.fine_tune.masked_low_rank import MaskedLowRank

# ---- least squares


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 9), share=st.floats(0, 1), damping=st.floats(1e-3, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_fit_is_the_best_of_its_mask_row_by_row(rows, columns, share, damping, seed):
    x, y, weight = drawn(40, columns, seed=seed), drawn(40, rows, seed=seed + 1), drawn(rows, columns, seed=seed + 2)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    sums = Sums()
    sums.add(x, {"y": y})
    found = fitted(weight, sums.gram(), sums.cross("y"), mask, damping, 4 * columns)
    assert not bool(found[~mask].any())
    held = damping * float((x.double().square().sum(0)).mean())
    for row in range(rows):
        kept = mask[row]
        part = x.double()[:, kept]
        normal = part.T @ part + held * torch.eye(int(kept.sum()), dtype=torch.float64)
        goal = part.T @ y.double()[:, row] + held * weight.double()[row, kept]
        assert torch.allclose(found[row, kept].double(), torch.linalg.solve(normal, goal), atol=1e-3)


def test_a_fit_by_hand_and_one_step_never_harms():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0], [8.0]])
    sums = Sums()
    sums.add(x, {"y": y})
    both, one = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[False, True]])
    assert fitted(torch.zeros(1, 2), sums.gram(), sums.cross("y"), both, 1e-9, 9)[0].tolist() == pytest.approx([3, 4])
    assert fitted(torch.zeros(1, 2), sums.gram(), sums.cross("y"), one, 1e-9, 9)[0].tolist() == pytest.approx([0, 4])
    weight, goal = drawn(4, 6), drawn(30, 4, seed=1)
    sums = Sums()
    sums.add(inputs := drawn(30, 6, seed=2), {"y": goal})
    errors = [float((goal - inputs @ weight.T).square().sum())]
    for steps in (1, 2, 8):
        found = fitted(weight, sums.gram(), sums.cross("y"), torch.ones(4, 6, dtype=torch.bool), 1e-9, steps)
        errors.append(float((goal - inputs @ found.T).square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_deviations_from_the_mean_and_the_bias_by_hand():
    sums = Sums()
    sums.add(torch.tensor([[1.0], [3.0]]), {"y": torch.tensor([[5.0], [11.0]])})
    sums.add(torch.empty(0, 1), {"y": torch.empty(0, 1)})
    assert sums.tokens == 2
    assert sums.gram(centred=True).tolist() == [[2]]
    assert sums.cross("y", centred=True).tolist() == [[6]]
    assert sums.bias("y", torch.tensor([[3.0]])).tolist() == [2]  # y = 3 x + 2


def test_a_dense_mask_gives_the_dense_outputs_back(tmp_path):
    dense = tiny()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for site in input_sites(model):
            for projection in site.projections:
                projection.weight.add_(0.2 * drawn(*projection.weight.shape))
    masks = {
        p.name: torch.ones_like(p.weight, dtype=torch.bool) for site in input_sites(model) for p in site.projections
    }
    ids = torch.randint(2, 97, (12, 40), generator=torch.Generator().manual_seed(1))
    before = compare(dense, model, ids.flatten(), 40).kl
    run_method("least_squares", task_of(dense, model, masks, tmp_path, tokens=ids), damping=1e-6, iterations=300)
    assert compare(dense, model, ids.flatten(), 40).kl < 1e-3 * before


def test_new_biases_meet_the_means_of_the_dense_outputs(tmp_path):
    dense = tiny()
    model, masks = sparse_of(dense)
    built = registry.build("heal.method", {"least_squares": {"new_bias": True}})
    assert built.config_changes(Decoder.open(model)) == {"attention_bias": True, "mlp_bias": True}
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(built.prepared(model)(IDS).logits, before)
    built.heal(task_of(dense, model, masks, tmp_path))
    seen = {}
    for which, whose in (("dense", dense), ("healed", model)):
        module = whose.model.layers[0].self_attn.q_proj
        handle = module.register_forward_hook(lambda _, given, output, which=which: seen.update({which: output}))
        with torch.no_grad():
            whose(IDS)
        handle.remove()
    assert torch.allclose(*(output.mean((0, 1)) for output in seen.values()), atol=1e-5)
    assert not torch.allclose(seen["dense"], seen["healed"], atol=1e-2)
    assert "cannot say" in registry.build("heal.method", {"least_squares": {"new_bias": True}}).declines(
        Decoder.open(tiny("qwen2"))
    )


# ---- LoRA inside the mask


def test_what_is_merged_is_what_was_trained():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    low = MaskedLowRank(weight, 1, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(low(weight), weight)  # B begins at zero
    low.first.data, low.second.data = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0], [1.0], [-1.0]])
    assert low(weight).tolist() == [[2, 0], [0, 4], [2, 2]]
    experts = MaskedLowRank(drawn(2, 3, 4), 2, 1.0, torch.Generator().manual_seed(0))
    assert experts.first.shape == (2, 2, 4)
    assert experts.second.shape == (2, 3, 2)


def test_without_zeros_what_lora_adds_has_its_rank(tmp_path):
    dense = tiny()
    model = copy.deepcopy(dense)
    run_method("lora", task_of(dense, model, {}, tmp_path), rank=2)
    for site, again in zip(input_sites(dense), input_sites(model), strict=True):
        for projection, trained in zip(site.projections, again.projections, strict=True):
            assert int(torch.linalg.matrix_rank(trained.weight - projection.weight, atol=1e-4)) == 2
    assert not any("parametrizations" in name for name, _ in model.named_modules())


# ---- distillation


def test_the_teachers_loss_is_kl_with_the_unlikely_tokens_as_one(tmp_path):
    dense, model = tiny(), sparse_of(tiny())[0]
    with torch.no_grad():
        theirs, ours = (m(IDS).logits[:, :-1].float() for m in (dense, model))
    chosen = torch.tensor([4, 1])
    p, q = theirs[chosen].softmax(-1).double(), ours[chosen].softmax(-1).double()
    exact = float((p * (p / q).log()).sum(-1).mean())
    whole = TopK.gather(dense, IDS, 1000, tmp_path)
    assert whole.logs.shape == (6, 23, 97)
    assert float(whole.divergence(ours[chosen], chosen)) == pytest.approx(exact, rel=1e-4)
    some = TopK.gather(dense, IDS, 5, tmp_path)  # of another number: gathered again
    by_hand = []
    for sample in range(2):
        for place in range(23):
            order = p[sample, place].argsort(descending=True)[:5]
            likely = [(float(p[sample, place, t]), float(q[sample, place, t])) for t in order]
            likely.append(tuple(1 - sum(each) for each in zip(*likely, strict=True)))
            by_hand.append(sum(a * math.log(a / b) for a, b in likely))
    found = float(some.divergence(ours[chosen], chosen))
    assert found == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-3)
    assert found <= exact


def test_a_teacher_that_was_killed_goes_on(tmp_path, monkeypatch):
    dense, tokens = tiny(), IDS.repeat(4, 1)
    whole = TopK.gather(dense, tokens, 7, tmp_path / "..")
    seen = []
    monkeypatch.setattr("sparity.healing.heal.teacher.window_logits", _stopping(seen, 12))
    with pytest.raises(KeyboardInterrupt):
        TopK.gather(dense, tokens, 7, tmp_path)
    assert '"done": 8' in (tmp_path / STATE).read_text()
    seen.clear()
    monkeypatch.setattr("sparity.healing.heal.teacher.window_logits", _stopping(seen, 99))
    again = TopK.gather(dense, tokens, 7, tmp_path)
    assert len(seen) == 16
    assert torch.equal(again.logs, whole.logs)
    assert torch.equal(again.places, whole.places)


def _stopping(seen, most):
    from sparity.quality.perplexity import window_logits

    def logits(model, ids):
        if len(seen) == most:
            raise KeyboardInterrupt
        seen.append(ids)
        return window_logits(model, ids)

    return logits


def test_hidden_states_by_hand_and_in_training(tmp_path):
    x, y = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert float(cosine_distance([x, x], [y, x])) == pytest.approx(0.25)
    dense = tiny()
    model, masks = sparse_of(dense)
    without = copy.deepcopy(model)
    with_hidden = run_method("distillation", task_of(dense, model, masks, tmp_path), hidden=1.0)
    plain = run_method("distillation", task_of(dense, without, masks, tmp_path))
    assert with_hidden.curves["loss"][1] == pytest.approx(2 * plain.curves["loss"][1], rel=1e-5)  # both count the same
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, without.model.layers[0].mlp.up_proj.weight)


# ---- what is reconstructed, and what judges


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("llama", ["self_attn", "mlp"]),
        ("gpt2", ["attn", "mlp"]),
        ("opt", ["self_attn", ""]),
        ("gpt_neox", ["attention", "mlp"]),
        ("phi3", ["self_attn", "mlp"]),
        ("mixtral", ["self_attn", "mlp"]),
    ],
)
def test_the_parts_of_a_block(family, paths):
    with Decoder.open(tiny(family)).block(0) as block:
        found = submodules(block)
    assert [part.name for part in found] == ["attention", "mlp"]
    assert [part.path for part in found] == paths


def test_sequences_that_overlap_with_those_that_judge_are_left_out():
    text = torch.arange(1000)
    tokens = torch.stack([text[at : at + 40] for at in (0, 100, 215, 300, 400, 500, 600, 200)])
    learned, held = apart(tokens)
    assert held[:, 0].tolist() == [600, 200]
    assert learned[:, 0].tolist() == [0, 100, 300, 400, 500]  # 215 shares 25 tokens with the last
    with pytest.raises(InvalidInput, match="guard: off"):
        apart(tokens[:1])
    with pytest.raises(InvalidInput, match="does not overlap"):
        apart(torch.stack([text[:40], text[:40]]))
