"""Sparse training: masks by hand, the published update written plainly, what is drawn, tickets, and resuming."""

import copy
import itertools
import json
import math

import pytest
import torch
from sparse_trainings import IDS, every, tiny, train
from torch.nn.functional import cross_entropy
from workspaces import Notes

import sparity
from sparity import registry
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.verify import verify
from sparity.training.sparse_training.methods.learned_mask import LearnedMask
from sparity.training.sparse_training.methods.sr_ste import _Refined
from sparity.training.sparse_training.stage import SparseTraining

METHODS = registry.names("sparse_training.method")
N_OF_M = [name for name in METHODS if name != "lottery"]
LOTTERIES = [{"rewind": 1}, {"ticket": "kept", "within": "model"}, {"ticket": "random", "start": "random"}]


def loss_of(model, ids):
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def two_of_four(weight):
    """The largest two of each four neighbours in a row, by sorting each four."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row, start in itertools.product(range(len(weight)), range(0, weight.shape[1], 4)):
        order = weight[row, start : start + 4].abs().argsort(descending=True)[:2]
        mask[row, start + order] = True
    return mask


# ---- laws of every method


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_zeros_come_in_their_number_and_earlier_ones_stay_in_every_layout(name, family):
    model, drawn = tiny(family).bfloat16(), torch.Generator().manual_seed(1)
    outside = {key: value.clone() for key, value in model.state_dict().items() if "embed" in key or "wte" in key}
    masks = {key: torch.rand(p.weight.shape, generator=drawn) < 0.8 for key, p in every(model).items()}
    for key, projection in every(model).items():
        projection.weight.mul_(masks[key])
    names = model.state_dict().keys()
    train(model, name, masks)
    assert model.state_dict().keys() == names
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in outside.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for key, projection in every(model).items():
        weight = projection.weight
        assert not bool(weight[~masks[key]].any())
        assert not bool(torch.signbit(weight[weight == 0]).any())
        if name in N_OF_M:
            assert int((weight.reshape(len(weight), -1, 4) != 0).sum(-1).max()) <= 2
        else:
            assert int((weight == 0).sum()) >= weight.numel() // 2


@pytest.mark.parametrize("method", [*N_OF_M, *({"lottery": options} for options in LOTTERIES)], ids=str)
def test_a_training_that_was_killed_goes_on_with_the_same_bits(method):
    options = {"steps": 27, "rate": 1e-3, "batch": 1}
    whole = tiny()
    trained = train(whole, method, **options)
    rounds = len(trained.curves)
    for dies in (26, *([40, 27 * 2 + 26] if rounds > 1 else [])):
        notes, resumed = Notes(dies=dies), tiny()
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), method, work=notes, **options)
        again = train(resumed, method, work=Notes(last=notes.saved), **options)
        assert again == trained
        assert all(
            torch.equal(*pair) for pair in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("name", METHODS)
def test_projections_that_stay_dense_get_no_zeros(name):
    model = tiny()
    train(model, name, dense=["*down_proj", "*k_proj"])
    for key, projection in every(model).items():
        assert bool((projection.weight == 0).any()) != key.endswith(("down_proj", "k_proj")), key


# ---- ASP


def test_asp_is_magnitude_and_a_fine_tune_with_the_mask_frozen(token_files, tiny_llama_folder, tmp_path):
    base = {
        "model": str(tiny_llama_folder),
        "calibration": {"tokens": token_files["calibration"], "batch": 3},
        "measure": {"perplexity": [], "speed": None},
    }
    steps = {"steps": 3, "rate": 0.003}
    apart = [
        {"prune": {"score": "magnitude", "pattern": "2:4"}},
        {"heal": {"method": {"finetune": steps}, "guard": False}},
    ]
    one = sparity.run({**base, "stages": [{"sparse_training": steps}]}, output=tmp_path / "one")
    two = sparity.run({**base, "stages": apart}, output=tmp_path / "two")
    assert all(torch.equal(*pair) for pair in zip(*(r.model().state_dict().values() for r in (one, two)), strict=True))
    assert verify(one.path).problems == ()
    record = json.loads((one.path / "sparity.json").read_text())["stages"][0]["decision"]
    assert record["steps"] == 3
    assert set(record["sparsity"].values()) == {0.5}


def test_without_steps_the_largest_stay_as_they_were():
    for name in ("asp", "sr_ste"):
        model, before = tiny(), every(tiny())
        assert train(model, name, steps=0).curves == {}
        for key, projection in every(model).items():
            assert torch.equal(projection.weight, before[key].weight * two_of_four(before[key].weight))


# ---- SR-STE


def test_the_gradient_reaches_all_weights_and_pulls_at_those_outside_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5]], requires_grad=True)
    mask = torch.tensor([[False, True, True, False]])
    shown = _Refined.apply(weight, mask, 0.1)
    assert shown.tolist() == [[0, -2, 3, 0]]
    (shown * torch.tensor([[5.0, 6, 7, 8]])).sum().backward()
    assert torch.allclose(weight.grad, torch.tensor([[5.1, 6, 7, 8.05]]))


def test_sr_ste_is_its_update_written_plainly():
    """W <- W - AdamW(g(M W) + decay (1 - M) W), M anew from W in every step; M W at the end."""
    model, again, decay, rate, steps = tiny(), tiny(), 0.5, 3e-3, 3
    train(model, {"sr_ste": {"decay": decay}}, steps=steps, rate=rate)
    found = {key: value.detach().clone() for key, value in again.named_parameters() if ".layers." in key}
    matrices = {f"{key}.weight" for key in every(again)}
    first, second = ({key: torch.zeros_like(value) for key, value in found.items()} for _ in range(2))
    shown = dict(again.named_parameters())
    for step in range(steps):
        masks = {key: two_of_four(found[key]) for key in matrices}
        for key, value in found.items():
            shown[key].data.copy_(value * masks[key] if key in masks else value)
        loss = loss_of(again, IDS[[(2 * step + number) % len(IDS) for number in range(2)]])
        gradients = torch.autograd.grad(loss, [shown[key] for key in found])
        now = rate * (1 + math.cos(math.pi * step / steps)) / 2
        for (key, value), gradient in zip(found.items(), gradients, strict=True):
            if key in masks:
                gradient = gradient + decay * value * ~masks[key]
            first[key] = 0.9 * first[key] + 0.1 * gradient
            second[key] = 0.999 * second[key] + 0.001 * gradient**2
            mean, square = first[key] / (1 - 0.9 ** (step + 1)), second[key] / (1 - 0.999 ** (step + 1))
            found[key] = value - now * mean / (square.sqrt() + 1e-8)
    for key, value in found.items():
        expected = value * two_of_four(value) if key in matrices else value
        assert torch.allclose(model.state_dict()[key], expected, atol=1e-5), key


# ---- learned masks


def test_there_are_six_patterns_of_two_in_four():
    assert LearnedMask().patterns.tolist() == [
        [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1],
    ]  # fmt: skip
    assert len(LearnedMask(kept=1).patterns) == 4
    assert LearnedMask().numbers(8) == 12


def test_weights_stay_and_a_strong_prior_keeps_the_largest():
    model, before = tiny(), every(tiny())
    train(model, {"learned_mask": {"prior": 100.0}}, steps=0)
    for key, projection in every(model).items():
        assert torch.equal(projection.weight, before[key].weight * two_of_four(before[key].weight))
    train(drawn := tiny(), {"learned_mask": {"prior": 0.0}}, steps=2)
    for key, projection in every(drawn).items():
        kept = projection.weight != 0
        assert torch.equal(kept.view(len(kept), -1, 4).sum(-1), torch.full((len(kept), kept.shape[1] // 4), 2))
        assert torch.equal(projection.weight, before[key].weight * kept)
        assert not torch.equal(kept, two_of_four(before[key].weight))


def test_learning_finds_the_patterns_that_the_text_wants():
    dense = tiny()
    losses = []
    for steps in (0, 40):
        model = copy.deepcopy(dense)
        train(model, {"learned_mask": {"prior": 0.0, "speed": 10.0}}, steps=steps, rate=2e-3, batch=6)
        losses.append(float(loss_of(model, IDS).detach()))
    assert losses[1] < losses[0]


# ---- lottery tickets


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": {"asp": {"of": 7}}}, "groups of 7 do not divide the 32 input columns of .*q_proj: list it under"),
        ({"method": {"asp": {"kept": 5}}}, "N weights are kept of M"),
        ({"method": {"lottery": {"sparsity": 1.0}}}, r"sparsity 1.0 must be in \[0, 1\)"),
        ({"method": {"lottery": {"rounds": 0}}}, "rounds must be 1 or more"),
        ({"method": {"lottery": {"rewind": 5}}, "steps": 5}, "rewind 5 must come before the last of 5 steps"),
        ({"method": {"sr_ste": {"decay": -1.0}}}, "decay -1.0 must be 0 or more"),
        ({"method": {"learned_mask": {"speed": 0.0}}}, "speed must be positive"),
        ({"method": "asp", "dense": ["*"]}, "every projection is to stay dense"),
        ({"method": "sr_stee"}, 'no method "sr_stee"; did you mean "sr_ste"'),
    ],
)
def test_what_is_refused(options, words, family_models):
    with pytest.raises(InvalidInput, match=words):
        SparseTraining(**options).decide(Decoder.open(family_models["llama"]), None)
