"""The laws of the design, for every plug-in that the registry finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import Objective

import references
from sparity import registry
from sparity.budgets.base import Site, allocate
from sparity.calibration import Statistics
from sparity.calibration.statistics import GRADIENTS, OUTPUT_GRAM, REGIONAL
from sparity.errors import InvalidInput
from sparity.static.prune.patterns.base import build_pattern
from sparity.static.prune.pruning import Pruning

STATISTICS = registry.names("statistic")
SCORES = registry.names("prune.score")
SOLVERS = registry.names("prune.solver")
BUDGETS = registry.names("budget")
PATTERNS = ("unstructured", "2:4", "1:4", "4:8", "block:2x4", "block:4x4")
FITTING = [  # single weights of a block may not change places
    (solver, pattern)
    for solver in SOLVERS
    for pattern in PATTERNS
    if not (registry.get("prune.solver", solver).exchanges and "block" in pattern)
]


def layer(rows=12, columns=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    inputs = torch.randn(3, 2 * columns, columns, generator=generator) @ mixing
    statistics = Statistics.gather("layer", STATISTICS)
    statistics.add(inputs)
    gradients = torch.randn(3, rows, columns, generator=generator)
    squares = gradients.square().mean(0)
    outputs = torch.randn(6 * columns, rows, generator=generator)
    known = {"gradient": gradients.mean(0), "gradient_square": squares, REGIONAL: squares}
    known[OUTPUT_GRAM] = outputs.T @ outputs / len(outputs)
    return weight, inputs, statistics.with_gradients(known)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_float32_of_the_weights_shape_deterministic_and_pure(name):
    weight, _, statistics = layer()
    score = registry.build("prune.score", name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        typed = weight.to(dtype)
        before = typed.clone()
        first, second = score.score(typed, statistics), score.score(typed, statistics)
        assert first.dtype == torch.float32
        assert first.shape == weight.shape
        assert first.device == weight.device
        assert torch.equal(first, second)
        assert torch.equal(typed, before)
        assert torch.isfinite(first).all()
        assert (first >= 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_a_score_asks_only_for_statistics_that_exist_and_refuses_to_go_without(name):
    score = registry.get("prune.score", name)
    assert set(score.needs) <= {*STATISTICS, *GRADIENTS, REGIONAL}
    if score.needs:
        with pytest.raises(InvalidInput, match="was not gathered"):
            score().score(layer()[0], Statistics.gather("layer", ()))


# taylor's second-order term may cancel the first; random does not look
@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("random", "taylor")])
def test_a_score_is_higher_for_a_larger_weight(name):
    weight, _, statistics = layer()
    larger = weight.clone()
    larger[3, 5] *= 4
    score = registry.build("prune.score", name)
    assert score.score(larger, statistics)[3, 5] > score.score(weight, statistics)[3, 5]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("group", ["row", "layer"])
def test_a_pattern_keeps_the_top_scores_and_its_mask_is_legal(name, group):
    pattern = build_pattern(name)
    scores = torch.rand(16, 32, generator=torch.Generator().manual_seed(1))
    sparsity = pattern.sparsity if pattern.sparsity is not None else 0.5
    keep = pattern.keep(scores, sparsity, group)
    assert keep.dtype == torch.bool
    assert pattern.breaches(keep) == 0
    assert abs(float((~keep).float().mean()) - sparsity) <= 1 / 16
    assert torch.equal(keep, pattern.keep(scores.clone(), sparsity, group))
    assert torch.equal(keep, pattern.keep(scores * 2, sparsity, group))  # only the order counts
    best = scores.clone()
    best[~keep] = 0
    assert torch.equal(pattern.keep(best, sparsity, group), keep)


@pytest.mark.parametrize("name", PATTERNS[1:])
def test_a_structured_pattern_sees_a_mask_that_breaks_it(name):
    pattern = build_pattern(name)
    keep = torch.ones(16, 32, dtype=torch.bool)
    keep[0, 1:3] = False  # a hole that is no block, and groups of M with all kept
    assert pattern.breaches(keep) > 0


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 30), sparsity=st.floats(0, 0.999), ties=st.integers(1, 4))
def test_unstructured_counts_and_ties(rows, columns, sparsity, ties):
    scores = torch.randint(0, ties, (rows, columns), generator=torch.Generator().manual_seed(rows)).float()
    pattern = build_pattern("unstructured")
    by_row = pattern.keep(scores, sparsity, "row")
    assert ((~by_row).sum(1) == (int(columns * sparsity) if sparsity else 0)).all()
    for row in range(rows):  # of equal scores the lower column goes first
        pruned = sorted(range(columns), key=lambda column: (float(scores[row, column]), column))
        assert (~by_row[row]).nonzero().flatten().tolist() == sorted(pruned[: int((~by_row[row]).sum())])
    by_layer = pattern.keep(scores, sparsity, "layer")
    if sparsity:
        threshold = scores.flatten().sort().values[int(rows * columns * sparsity)]
        assert torch.equal(by_layer, scores > threshold)
    exact = build_pattern({"unstructured": {"count": "exact"}}).keep(scores, sparsity, "layer")
    assert int((~exact).sum()) == int(rows * columns * sparsity)


@pytest.mark.parametrize(("solver", "pattern"), FITTING)
@pytest.mark.parametrize("score", [None, "magnitude", "wanda"])
def test_a_solver_keeps_the_mask_and_is_never_worse_than_zeroing(solver, pattern, score):
    weight, inputs, statistics = layer(16, 32)
    pruning = Pruning.of(score, pattern, solver)
    pruned, keep = pruning.apply(weight, statistics, pruning.sparsity)
    assert pruned.dtype == weight.dtype
    assert (pruned[~keep] == 0).all()
    assert pruning.pattern.breaches(pruned != 0) == 0
    zeroed = torch.where(keep, weight, 0.0)
    outputs = statistics.output_gradient_gram if OUTPUT_GRAM in pruning.solver.needs else None
    error, plain = (references.output_error(weight, found, inputs, outputs) for found in (pruned, zeroed))
    assert error <= plain * (1 + 1e-5)


@pytest.mark.parametrize("name", BUDGETS)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    target=st.floats(0, 0.99),
)
def test_a_budget_meets_its_target_and_treats_equals_equally(name, sizes, target):
    sites = [Site(f"site{i}", float(size), depth=i % 4, evidence=float(size % 7)) for i, size in enumerate(sizes)]

    def hurts(shares):  # of a model whose sites hurt by the square of what they lose
        return sum(site.cost * (1 + site.evidence) * shares.get(site.name, 0.0) ** 2 for site in sites)

    loss = Objective(hurts, lambda block: {site.name for site in sites if site.depth == block})
    shares = registry.build("budget", name).allocate(sites, target, loss)
    assert shares.keys() == {site.name for site in sites}
    mean = sum(shares[site.name] * site.cost for site in sites) / sum(site.cost for site in sites)
    assert mean == pytest.approx(target, abs=1e-9)
    assert all(0 <= share < 1 for share in shares.values())
    if registry.get("budget", name).measures:
        assert loss(shares) <= loss(dict.fromkeys(shares, target)) * (1 + 1e-12)
    sites = [Site(site.name, 5.0, depth=2, evidence=1.0) for site in sites]
    shares = registry.build("budget", name).allocate(sites, target, loss)
    assert len({round(share, 12) for share in shares.values()}) == 1


def test_overrides_are_set_aside_and_the_rest_makes_up_for_them():
    sites = [Site(name, 100.0) for name in ("a.up", "a.down", "b.up", "b.down")]
    shares = allocate(registry.build("budget", "uniform"), sites, 0.5, {"*.up": 0.4, "b.*": 0.6})
    assert shares == pytest.approx({"a.up": 0.4, "b.up": 0.6, "b.down": 0.6, "a.down": 0.4})  # the later glob wins


def test_overrides_that_cannot_be_met():
    uniform, sites = registry.build("budget", "uniform"), [Site("a", 100.0), Site("b", 100.0)]
    assert allocate(uniform, sites, 0.5, {"a": 0.2}) == pytest.approx({"a": 0.2, "b": 0.8})
    for fixed, words in (
        ({"a": 0.0}, "would need a sparsity of 1.000"),
        ({"a": 0.9, "b": 0.9}, "fix every projection at a mean of 0.9"),
        ({"c*": 0.1}, '"c\\*" matches no projection'),
        ({"a": 1.0}, "must lie in"),
    ):
        with pytest.raises(InvalidInput, match=words):
            allocate(uniform, sites, 0.5, fixed)
