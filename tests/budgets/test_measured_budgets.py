"""Greedy and knapsack: hand-worked cases, the best choice by trying all, and what they refuse."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from objectives import Objective

from sparity import registry
from sparity.budgets.base import Site, allocate
from sparity.errors import CorruptFile, InvalidInput


def build(name, **options):
    return registry.build("budget", {name: options})


def additive(table):
    """An objective from `{site: {share: loss}}`."""
    return lambda shares: sum(table[name][round(share, 6)] for name, share in shares.items())


def counted(objective):
    calls = []

    def measure(shares):
        calls.append(dict(shares))
        return objective(shares)

    return measure, calls


@pytest.mark.parametrize("name", ["greedy", "knapsack"])
def test_by_hand(name):
    """Two sites of equal size, one of which can lose everything for nothing."""
    sites = [Site("tough", 10.0), Site("tender", 10.0)]
    measure, _ = counted(lambda shares: 0.1 * shares["tough"] if "tender" not in shares else
                         0.1 * shares.get("tough", 0) + 10 * shares["tender"])  # fmt: skip
    shares = build(name, step=0.1, spread=0.2).allocate(sites, 0.5, measure)
    assert shares == pytest.approx({"tough": 0.7, "tender": 0.3})


def test_greedy_measures_what_was_taken_together():
    """Alone each of b and c is free; together they are not."""

    def loss(shares):
        b, c = shares["b"] > 0.4, shares["c"] > 0.4
        return 5.0 * (b and c) + 0.5 * (shares["a"] > 0.4)

    sites = [Site(name, 1.0) for name in "abc"]
    shares = build("greedy", step=0.3, spread=0.3).allocate(sites, 0.5, loss)
    assert (shares["b"] > 0.4) != (shares["c"] > 0.4)
    assert loss(shares) <= loss(dict.fromkeys("abc", 0.5))


def test_greedy_measures_few_allocations_again():
    sites = [Site(str(i), 1.0) for i in range(10)]
    measure, calls = counted(lambda shares: sum((1 + i) * shares[str(i)] ** 2 for i in range(10)))
    build("greedy", step=0.1, spread=0.3).allocate(sites, 0.5, measure)
    steps = 30
    assert len(calls) < 3 * steps + 10  # every step for every site would be 300


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.lists(st.floats(0, 10), min_size=3, max_size=3)), min_size=2, max_size=4)
)
@example([(1, [0.0, 0.0, 0.0]), (1, [0.0, 1.0, 8.529499260400727e-10])])  # HiGHS takes the last for 0
def test_knapsack_is_the_best_of_all_choices(found):
    sites = [Site(str(i), float(size)) for i, (size, _) in enumerate(found)]
    levels = [0.3, 0.5, 0.7]
    losses = {str(i): dict(zip(levels, loss, strict=True)) for i, (_, loss) in enumerate(found)}
    seen = []

    def measure(shares):
        if len(shares) == 1:
            (name, share), *_ = shares.items()
            return losses[name][round(share, 6)]
        seen.append(dict(shares))
        return 0.0  # what is compared at the end: uniform wins a draw, so look at what was put against it

    build("knapsack", step=0.2, spread=0.2).allocate(sites, 0.5, measure)
    total = sum(site.cost for site in sites)
    choices = itertools.product(levels, repeat=len(sites))
    legal = [
        pick for pick in choices if sum(s.cost * x for s, x in zip(sites, pick, strict=True)) >= 0.5 * total - 1e-9
    ]
    best = min(sum(losses[s.name][x] for s, x in zip(sites, pick, strict=True)) for pick in legal)
    given_up = sum(site.cost * seen[0][site.name] for site in sites) / total
    assert given_up == pytest.approx(0.5, abs=1e-9)

    # undo the shift onto the target: every share was moved down by the same amount
    def shifts(pick):
        return [x - seen[0][site.name] for site, x in zip(sites, pick, strict=True)]

    near = [pick for pick in legal if max(shifts(pick)) - min(shifts(pick)) < 1e-6]
    assert min(sum(losses[s.name][x] for s, x in zip(sites, pick, strict=True)) for pick in near) == pytest.approx(best)


def test_bytes_pay_for_the_mask_too():
    """Four sites in bfloat16 at 50 %: leaving one dense saves its mask, so the others need to give up less."""
    sites = [Site(str(i), 1600.0, bytes=3200.0) for i in range(4)]

    def loss(shares):
        return 100.0 * shares.get("0", 0.0) + sum(share**2 for share in shares.values())

    shares = build("knapsack", step=0.05, spread=0.5, cost="bytes").allocate(sites, 0.5, loss)
    saved = {
        name: sum(3200 * share - (1600 / 8 if share else 0) for share in given.values())
        for name, given in (("found", shares), ("uniform", dict.fromkeys("0123", 0.5)))
    }
    assert shares["0"] == 0.0
    assert saved["found"] >= saved["uniform"] - 1e-6
    weights = sum(shares.values()) / 4
    assert 0.46 < weights < 0.5  # fewer zeros, the same bytes
    assert loss(shares) < loss(dict.fromkeys("0123", 0.5))


def test_matrices_of_a_block_move_together():
    sites = [Site(f"{block}.{name}", 1.0, depth=block) for block in range(3) for name in ("q", "up")]

    def loss(shares):
        return sum((1 + int(name[0])) * share**2 for name, share in shares.items())

    for name in ("greedy", "knapsack"):
        shares = build(name, per="block").allocate(sites, 0.5, loss)
        for block in range(3):
            assert shares[f"{block}.q"] == shares[f"{block}.up"]
        assert shares["0.q"] > shares["2.q"]


def test_never_worse_than_uniform():
    """A loss that the sum of single losses foresees wrongly."""
    sites = [Site("a", 1.0), Site("b", 1.0)]

    def loss(shares):
        return 0.0 if len({round(share, 6) for share in shares.values()}) == 1 and len(shares) == 2 else 1.0 + (
            shares.get("a", 0.0)
        )  # fmt: skip

    for name in ("greedy", "knapsack"):
        assert build(name).allocate(sites, 0.5, loss) == {"a": 0.5, "b": 0.5}


def test_fixed_sites_take_part_in_what_is_measured():
    sites = [Site(name, 1.0) for name in "abc"]
    for name in ("greedy", "knapsack", "evopress", "block_greedy"):
        measure, calls = counted(lambda shares: sum((1 + (name == "c")) * share**2 for name, share in shares.items()))
        shares = allocate(build(name), sites, 0.5, {"a": 0.2}, Objective(measure))
        assert shares["a"] == 0.2
        assert shares["b"] > shares["c"]
        assert sum(shares.values()) == pytest.approx(1.5)
        assert calls
        assert all(call["a"] == 0.2 for call in calls)


BAD = '{"rows": [{"part": "layer", "projections": ["a"], "sparsity": 0.5, %s}]}'


def table(tmp_path, rows):
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"rows": rows}))
    return str(path)


def test_a_table_is_read_instead_of_measuring(tmp_path):
    losses = {"a": {0.25: 0.1, 0.75: 0.2}, "b": {0.25: 1.0, 0.75: 9.0}}
    rows = [
        {"part": "layer", "projections": [name], "sparsity": share, "kl": kl}
        for name, found in losses.items()
        for share, kl in found.items()
    ]
    rows.append({"part": "attention", "projections": ["a", "b"], "sparsity": 0.25, "kl": 7.0})
    budget = build("knapsack", table=table(tmp_path, rows))
    assert not budget.measures
    sites = [Site("a", 1.0), Site("b", 1.0)]
    assert budget.allocate(sites, 0.5) == pytest.approx({"a": 0.75, "b": 0.25})
    assert budget.allocate(sites, 0.375) == pytest.approx({"a": 0.75, "b": 0.0})
    with pytest.raises(InvalidInput, match="gives up enough"):
        budget.allocate(sites, 0.9)
    with pytest.raises(InvalidInput, match=r"no measurement of c: measure this model"):
        budget.allocate([*sites, Site("c", 1.0)], 0.5)
    with pytest.raises(InvalidInput, match="a table holds layers"):
        build("knapsack", table=budget.table, per="block").allocate([*sites, Site("c", 1.0, depth=1)], 0.5)
    rows.append({"part": "layer", "projections": ["c"], "sparsity": 0.5, "kl": 1.0})
    with pytest.raises(InvalidInput, match=r"no measurement of a at sparsity 0\.5"):
        build("knapsack", table=table(tmp_path, rows)).allocate(sites, 0.5)
    values = ('"kl": 1e999', '"kl": NaN', '"kl": "0.5"', '"kl": true', f'"kl": {10**400}')
    shapeless = ("{}", '{"rows": 3}', '{"rows": [{}]}', '{"rows": [{"part": "layer", "name": "a"}]}', "[]", "x")
    for content in (*shapeless, *(BAD % value for value in values), BAD.replace("0.5", "5") % '"kl": 1'):
        (tmp_path / "sensitivity.json").write_text(content)
        with pytest.raises(CorruptFile, match=r"sensitivity\.json"):
            budget.allocate(sites, 0.5)


@pytest.mark.parametrize("name", ["greedy", "knapsack"])
def test_what_they_refuse(name):
    for options, words in (
        ({"step": 0.0}, "must fit 0 < step <= spread <= 1"),
        ({"step": 0.4, "spread": 0.3}, "must fit 0 < step <= spread <= 1"),
        ({"samples": 0}, "measure on at least 1 sequence"),
        ({"per": "head"}, "expected 'block' or 'role' or 'layer'"),
    ):
        with pytest.raises(InvalidInput, match=words):
            build(name, **options)
    with pytest.raises(InvalidInput, match="it needs an objective"):
        build(name).allocate([Site("a", 1.0), Site("b", 1.0)], 0.5)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    st.lists(st.floats(0.1, 10), min_size=2, max_size=2),
    st.lists(st.integers(1, 50), min_size=2, max_size=2),
)
def test_where_losses_are_products_margins_find_what_all_measurements_find(blocks, roles, sizes):
    """loss(block, role, sparsity) = its block's factor times its role's times sparsity ** 3."""
    kinds = dict(zip(("up", "down"), zip(roles, sizes, strict=True), strict=True))
    sites = [Site(f"{block}.{kind}", float(size), block) for block in range(4) for kind, (_, size) in kinds.items()]
    factor = {site.name: blocks[site.depth] * kinds[site.role][0] for site in sites}
    alone, few = (counted(lambda shares: sum(factor[name] * share**3 for name, share in shares.items())) for _ in "ab")
    found = [
        build("knapsack", step=0.2, spread=0.2, separable=separable).allocate(sites, 0.5, measure)
        for separable, (measure, _) in ((False, alone), (True, few))
    ]
    assert sum(factor[name] * share**3 for name, share in found[1].items()) == pytest.approx(
        sum(factor[name] * share**3 for name, share in found[0].items()), rel=1e-6
    )
    assert (len(alone[1]), len(few[1])) == (8 * 3 + 2, 2 * 3 + 4 + 2)


def test_roles_move_together():
    sites = [Site(f"layers.{block}.mlp.{role}", 1.0, block) for block in range(3) for role in ("up", "down")]
    shares = build("knapsack", step=0.1, spread=0.1, per="role").allocate(
        sites, 0.5, lambda shares: sum(share * (5 if name.endswith("down") else 1) for name, share in shares.items())
    )
    assert shares == pytest.approx({site.name: 0.4 if site.role == "down" else 0.6 for site in sites})


def test_the_role_of_an_expert_is_that_of_all():
    assert Site("model.layers.3.mlp.experts.down_proj.7", 1.0).role == "down_proj"


@pytest.mark.parametrize("options", [{"per": "block"}, {"per": "role"}, {"table": "sensitivity.json"}])
def test_separable_is_for_measured_layers(options):
    with pytest.raises(InvalidInput, match="leave `table` and `per` out"):
        build("knapsack", separable=True, **options)
