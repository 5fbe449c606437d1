"""Lottery tickets: rounds by hand, written plainly, and what a ticket begins with."""

import pytest
import torch
from sparse_trainings import IDS, every, tiny, train
from workspaces import Notes

from sparity.training.fine_tune.steps import LOSSES
from sparity.training.sparse_training.methods.base import Task
from sparity.training.sparse_training.methods.lottery import Lottery


def test_each_round_leaves_the_same_share():
    shares = [Lottery(sparsity=0.875, rounds=3).share_after(number) for number in (1, 2, 3)]
    assert shares == pytest.approx([0.5, 0.75, 0.875])
    assert Lottery(sparsity=0.5, rounds=3, rewind=2).total(10) == 10 + 3 * 8
    assert Lottery().total(0) == 0


@pytest.mark.parametrize("within", ["layer", "model"])
def test_without_steps_it_is_magnitude_pruning_of_the_exact_count(within):
    model, before = tiny(), every(tiny())
    train(model, {"lottery": {"sparsity": 0.6, "within": within}}, steps=0)
    sizes = {key: projection.weight.abs() for key, projection in before.items()}
    every_size = torch.cat([size.flatten() for size in sizes.values()])
    for key, projection in every(model).items():
        among = sizes[key].flatten() if within == "layer" else every_size
        limit = among.sort().values[int(len(among) * 0.6)]
        assert torch.equal(projection.weight != 0, sizes[key] >= limit)
        assert torch.equal(projection.weight, before[key].weight * (sizes[key] >= limit))


class Watched(Notes):
    """Notes every checkpoint by its step."""

    def __init__(self):
        super().__init__()
        self.all = {}

    def save(self, step, tensors):
        super().save(step, tensors)
        self.all[step] = self.saved[1]


def test_one_round_is_train_prune_rewind_train_written_plainly():
    """theta_0 -> train -> m: the largest half of each matrix -> train m theta_0, by ordinary trainings."""
    ticket = tiny()
    trained = train(ticket, {"lottery": {"sparsity": 0.5, "rounds": 1}}, steps=4)
    whole, again = tiny(), tiny()
    whole_curve = train(whole, {"asp": {"kept": 4}}, steps=4).curves["loss"]
    masks = {}
    for key, projection in every(whole).items():
        size = projection.weight.abs()
        masks[key] = size >= size.flatten().sort().values[size.numel() // 2]
        every(again)[key].weight.mul_(masks[key])
    curve = train(again, {"asp": {"kept": 4}}, masks, steps=4).curves["loss"]
    assert trained.curves == {"round 1": whole_curve, "round 2": curve}
    for key, projection in every(ticket).items():
        assert torch.equal(projection.weight != 0, masks[key])
    assert all(
        torch.equal(*pair) for pair in zip(ticket.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_ticket_begins_with_the_weights_of_the_step_it_is_put_back_to():
    work = Watched()
    trained = train(tiny(), {"lottery": {"rounds": 1, "rewind": 3}}, work=work, steps=5)
    kept = work.all[10]  # the end of the second round holds what it began with
    short = Watched()
    train(tiny(), {"lottery": {"rounds": 1}}, work=short, steps=5)
    first = {key: value for key, value in short.all[5].items() if key.startswith("weight.")}
    assert all(torch.equal(work.all[5][key], value) for key, value in first.items())  # the same training
    rewound = {key: value for key, value in kept.items() if key.startswith("round.rewound.")}
    begun = {f"round.rewound.weight.{key}": value for key, value in tiny().named_parameters()}
    assert rewound.keys() == {f"round.rewound.{key}" for key in first}
    assert any(not torch.equal(value, begun[key]) for key, value in rewound.items())
    one, two = (list(trained.curves[f"round {number}"].values()) for number in (1, 2))
    assert one[:3] == two[:3]  # the steps before it are not done again
    assert one[3] != two[3]
    assert len(kept[LOSSES]) == 5


def test_a_random_ticket_has_the_mask_and_none_of_the_weights():
    model = tiny()
    task_masks = {key: torch.ones_like(projection.weight, dtype=torch.bool) for key, projection in every(model).items()}
    task = Task(model, tuple(every(model).values()), task_masks, frozenset(), IDS, Notes(), 0, 1e-3, 2)
    before = {key: projection.weight.clone() for key, projection in every(model).items()}
    Lottery(ticket="random").train(task)
    for key, projection in every(model).items():
        size = before[key].abs().flatten()
        assert projection.weight.count_nonzero() == len(size) - int(len(size) * 0.5)
        assert not bool((projection.weight[projection.weight != 0] == before[key][projection.weight != 0]).any())
    spread = torch.cat([p.weight[p.weight != 0].flatten() for p in every(model).values()]).std()
    assert float(spread) == pytest.approx(model.config.initializer_range, rel=0.1)


# ---- what is refused
