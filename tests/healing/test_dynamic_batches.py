"""Dynamic batches: what is learned, what judges, and how the shares follow."""

import copy

import pytest
import torch
from healing_tasks import IDS, sparse_of, task_of, tiny

import sparity
from sparity import registry
from sparity.calibration.tokens import Windows
from sparity.errors import InvalidInput
from sparity.healing.heal.methods.base import Task
from sparity.healing.heal.methods.dynamic_batches import losses
from sparity.pipeline.run.tokens import calibration_tokens, in_turns
from sparity.recipe import Calibration
from sparity.training.fine_tune.mixture import updated_shares
from sparity.training.fine_tune.steps import next_token_loss

NAMES = ["even", "odd"]


@pytest.fixture(scope="module")
def pair():
    dense = tiny(blocks=1)
    return dense, *sparse_of(dense)


def healed(pair, folder, places=None, **options):
    dense, model, masks = pair
    model = copy.deepcopy(model)
    task = task_of(dense, model, masks, folder)
    if places is not None:
        task = Task(model, masks, IDS[: len(places)], task.blocks, task.work, task.load_dense, places)
    options = {"domains": NAMES, "steps": 5, "rate": 3e-3, "batch": 2, "every": 2, **options}
    return model, registry.build("heal.method", {"dynamic_batches": options}).heal(task)


def test_shares_follow_the_losses_as_the_formula_says(pair, tmp_path):
    dense, start, _ = pair
    judging = [IDS[[4]], IDS[[5]]]  # of each domain's three sequences the last
    _, found = healed(pair, tmp_path, steps=2, every=1, rate=1e-9)
    assert list(found.curves) == ["loss", "share of even", "share of odd"]
    excess = losses(start, judging) - losses(dense, judging)
    expected = updated_shares(torch.tensor([0.5, 0.5]), excess.clamp_min(0))
    shares = [found.curves[f"share of {name}"] for name in NAMES]
    assert [share[1] for share in shares] == [0.5, 0.5]
    assert [share[2] for share in shares] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_paper_clamps_what_is_ahead_and_the_code_does_not(pair, tmp_path):
    _, start, _ = pair
    found = losses(start, [IDS[[4]], IDS[[5]]])
    targets = [float(found[0]) + 2, float(found[1])]  # the first is ahead by 2 nats
    given = {"targets": targets, "steps": 2, "every": 1, "rate": 1e-9}
    _, paper = healed(pair, tmp_path, **given)
    _, code = healed(pair, tmp_path, **given, reference=True)
    assert paper.curves["share of even"][2] == pytest.approx(0.5, abs=1e-5)
    wanted = updated_shares(torch.tensor([0.5, 0.5]), torch.tensor([-2.0, 0.0]))
    assert code.curves["share of even"][2] == pytest.approx(float(wanted[0]), abs=1e-5)


def test_batches_hold_what_the_shares_say(pair, tmp_path, monkeypatch):
    seen = []

    def watched(model, ids):
        seen.append(ids)
        return next_token_loss(model, ids)

    monkeypatch.setattr("sparity.healing.heal.methods.dynamic_batches.next_token_loss", watched)
    healed(pair, tmp_path, batch=4, steps=1, shares=[0.75, 0.25], targets=[1.0, 1.0])
    (batch,) = seen
    assert torch.equal(batch, IDS[[0, 2, 1, 0]])  # two of the first, one of the second, the first again from its start


def test_domains_go_by_the_places_in_the_calibration_text(pair, tmp_path):
    _, found = healed(pair, tmp_path, places=[0, 2, 4, 1, 3], steps=1)
    assert found.curves["share of odd"] == {1: 0.5}
    with pytest.raises(InvalidInput, match="1 sequences of odd are too few"):
        healed(pair, tmp_path, places=[0, 2, 4, 1], steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["one"]}, "two domains or more"),
        ({"domains": ["one", "one"]}, "each once"),
        ({"targets": [1.0]}, "1 targets are given for 2 domains"),
        ({"shares": [0.5, 0.4]}, "sum to 1"),
        ({"shares": [1.0, 0.0]}, "positive"),
        ({"every": 0}, "every must be 1 or more"),
        ({"floor": 2.0}, r"floor in \[0, 1\]"),
        ({"steps": -1}, "steps 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        registry.build("heal.method", {"dynamic_batches": {"domains": NAMES, **options}})


def test_domains_have_to_be_named():
    with pytest.raises(InvalidInput, match="needs the option domains"):
        registry.build("heal.method", "dynamic_batches")


def test_domains_of_the_calibration_text_take_turns():
    def draw(text, windows):
        return torch.full((windows.samples, windows.length), int(text))

    found = in_turns(["7", "8", "9"], Windows(5, 2), draw)
    assert found.tolist() == [[7, 7], [8, 8], [9, 9], [7, 7], [8, 8]]


def test_each_domain_is_drawn_as_it_would_be_alone():
    from sparity.models.loading import load_tokenizer

    model, tokenizer = sparity.load("zoo:llama"), load_tokenizer("zoo:llama")
    sources = {"docs": "python-docs:calibration", "code": "python-code:calibration"}

    def drawn(text, samples):
        section = Calibration(text=text, documents="joined", samples=samples, length=16)
        return calibration_tokens(section, tokenizer, model.config)

    both = drawn({"docs": sources["docs"], "words": sources["docs"]}, 5)
    assert torch.equal(both[0::2], drawn(sources["docs"], 3))
    assert torch.equal(both[1::2], drawn(sources["docs"], 2))
    with pytest.raises(InvalidInput, match="1 samples are too few for 2 domains"):
        drawn(sources, 1)
    with pytest.raises(ValueError, match="names no domain"):
        Calibration(text={})
