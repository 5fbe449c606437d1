"""R-Sparse, LaRoSA and the plan's predictor by hand, by their laws, and in whole models."""

import copy
import math

import pytest
import torch

import sparity
from sparity import registry
from sparity.dynamic.activations.methods.r_sparse import LowRank
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.token_scale import features, largest_scales
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import CorruptFile, InvalidInput, NumericalError
from sparity.models.attached_runtime import input_sites

DOWN = "model.layers.1.mlp.down_proj"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def down_of(model):
    return next(p for p in places_of(model, input_sites(model), ["down"]) if p.name == DOWN)


def inputs_behind(model, method, tensors, x):
    """What down multiplies when `x` [tokens, in] is its input."""
    place, found = down_of(model), []
    with method.attach(place, tensors, SparseTokens(first=0)):
        late = place.module.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        place.module(x[None])
        late.remove()
    assert not place.module._forward_pre_hooks
    return found[0][0]


# ---- R-Sparse


def test_r_sparse_weighs_channels_by_the_norms_of_their_columns():
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    weight = torch.diag(torch.tensor([8.0, 3.0, 1.0, 0.5]))  # scores 8, 6, 3, 2
    mask = sparity.activation_mask(x, weight, method="r_sparse", sparsity=0.5)
    assert mask.tolist() == [[True, True, False, False]]
    mask = sparity.activation_mask(x, weight, method="r_sparse", sparsity=0.5, reference=True)
    assert mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("rho", "channels", "rank"),
    [(1.0, 50, 0), (0.5, 25, 8), (0.0, 0, 16), (0.99, 49, 0)],  # (100 x 50 x 0.5 - channels x 50) / 150, rounded down
)
def test_the_budget_of_r_sparse_is_split_by_rho(rho, channels, rank):
    method = registry.build("activations.method", {"r_sparse": {"rho": rho}})
    assert method.rank(50, 100, 0.5) == rank
    fitted = sparity.fit_activations(drawn(40, 100), drawn(50, 100), method="r_sparse", sparsity=0.5, rho=rho)
    assert 1 - fitted.realised == pytest.approx(0.5 * rho, abs=1e-3)
    assert ("basis" in fitted.tensors) == (rank > 0)
    if rank:
        basis = fitted.tensors["basis"]
        assert basis.shape == (100, rank)
        assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)


def test_a_low_rank_is_what_the_singular_values_give():
    weight, x = drawn(6, 9), drawn(5, 9, seed=1)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rule = SkipRule(torch.tensor(0.7))
    counts = x.abs() > 0.7
    kept, rest = x.double() * counts, x.double() * ~counts
    for rank in (1, 3, 6):
        found = LowRank(rule, vh[:rank].T.float())(x).double() @ weight.double().T
        wanted = kept @ weight.double().T + ((rest @ vh[:rank].T) * s[:rank]) @ u[:, :rank].T
        assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(found, x.double() @ weight.double().T, atol=1e-5)  # the full rank is dense


def test_r_sparse_follows_the_shapes_of_grouped_queries(family_models):
    model = family_models["llama"]
    ids = torch.arange(48).view(2, 24)
    options = {"method": "r_sparse", "sparsity": 0.5, "sites": ["k", "down"], "rho": 0.5}
    dense = model(ids).logits
    with sparity.with_activations(model, ids, **options) as sparse:
        changed = sparse(ids).logits
        assert not torch.equal(changed, dense)
        assert torch.equal(copy.deepcopy(sparse)(ids).logits, changed)
    assert torch.equal(model(ids).logits, dense)


def test_r_sparse_refuses_what_it_cannot_do():
    for options, words in (({"rho": 1.5}, r"rho 1.5 must lie in \[0, 1\]"), ({"rho": 0.0}, "give it")):
        with pytest.raises(InvalidInput, match=words):
            sparity.fit_activations(drawn(4, 8), method="r_sparse", sparsity=0.5, **options)


def test_a_basis_that_does_not_fit_is_refused(family_models):
    place = down_of(family_models["llama"])
    method, threshold = registry.build("activations.method", "r_sparse"), torch.tensor(1.0)
    for basis, words in ((torch.ones(3, 2), "basis is float32"), (torch.full((place.columns, 1), math.nan), "finite")):
        wrong = {"threshold": threshold, "basis": basis}
        with pytest.raises(CorruptFile, match=words), method.attach(place, wrong, SparseTokens()):
            pass


# ---- LaRoSA


def test_larosa_keeps_the_largest_coordinates_of_the_principal_directions():
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])  # columns: the directions
    coordinates = torch.tensor([[9.0, 1.0], [-7.0, 2.0], [1.0, 3.0]])
    fitted = sparity.fit_activations(coordinates @ turn.T, method="larosa", sparsity=0.5)
    rotation = fitted.tensors["rotation"]
    assert torch.allclose(rotation.T @ rotation, torch.eye(2), atol=1e-6)
    directions = torch.linalg.eigh((turn @ coordinates.T @ coordinates @ turn.T).double()).eigenvectors.float()
    assert torch.allclose(rotation.abs(), directions.abs(), atol=1e-6)
    assert fitted.keep(coordinates @ turn.T).tolist() == [[False, True], [False, True], [True, False]]


def test_larosa_by_hand_in_front_of_a_module(family_models):
    model = copy.deepcopy(family_models["llama"])
    method = registry.build("activations.method", "larosa")
    columns = down_of(model).columns
    x = drawn(5, columns)
    fitted = sparity.fit_activations(x, method="larosa", sparsity=0.75)
    rotation = fitted.tensors["rotation"]
    turned = x @ rotation
    wanted = []
    for token in turned:
        largest = token.abs().argsort(descending=True)[: columns // 4]
        wanted.append(torch.where(torch.isin(torch.arange(columns), largest), token, 0.0))
    found = inputs_behind(model, method, fitted.tensors, x)
    assert torch.allclose(found, torch.stack(wanted) @ rotation.T, atol=1e-5)
    everything = {**fitted.tensors, "kept": torch.tensor(columns)}
    assert torch.allclose(inputs_behind(model, method, everything, x), x, atol=1e-5)


def test_larosa_rotates_the_residual_stream_only(family_models):
    model, ids = family_models["llama"], torch.arange(48).view(2, 24)
    stage = {"method": "larosa", "sparsity": 0.5}
    with sparity.with_activations(model, ids, **stage):
        hooks = {
            name.rpartition(".")[2]: type(next(iter(module._forward_pre_hooks.values()))).__name__
            for name, module in model.named_modules()
            if name.endswith("_proj")
        }
    assert hooks == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "InputChange"),
        **dict.fromkeys(("o_proj", "down_proj"), "InputSkip"),
    }


# ---- the plan's predictor


def test_what_the_predictor_sees_of_a_token():
    found = features(torch.tensor([[4.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), torch.tensor(2.0))
    assert torch.allclose(found[0], torch.tensor([0.0, 0.0, 1.0, 0.5], dtype=torch.float64))
    assert found[1, [0, 2, 3]].tolist() == pytest.approx([-1.0, -1.0, 1.0])


def test_the_search_gives_every_token_the_largest_scale_within_one_bound():
    x, weight = drawn(30, 16).abs() * torch.linspace(0.5, 2, 30)[:, None], drawn(8, 16, seed=1)
    base = x.flatten().kthvalue(240).values
    scales, searched = largest_scales(x, base, weight, 0.5)
    assert torch.equal(searched, x)

    def error(token, scale):
        lost = torch.where(token.abs() <= scale * base, token, 0)
        return float((weight @ lost).norm() / (weight @ token).norm())

    grid = [2 ** (step / 8) for step in range(-16, 17)]
    worst = max(error(token, float(scale)) for token, scale in zip(x, scales, strict=True) if float(scale) > 0.25)
    for token, scale in zip(x, scales, strict=True):
        beyond = [step for step in grid if step > float(scale) * 1.01]
        assert all(error(token, step) > worst - 1e-6 for step in beyond)
    share = torch.stack([(t.abs() <= s * base).double().mean() for t, s in zip(x, scales, strict=True)])
    assert 0.4 < float(share.mean()) <= 0.5


def test_tokens_of_another_size_get_another_threshold():
    loud = torch.ones(64, 1)
    loud[::2] = 8.0
    x = drawn(64, 128) * loud
    static = sparity.fit_activations(x, method="teal", sparsity=0.5).keep(x).double().mean(-1)
    dynamic = sparity.fit_activations(x, drawn(32, 128), method="plan_predictor", sparsity=0.5).keep(x)
    dynamic = dynamic.double().mean(-1)
    assert float(dynamic.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(dynamic.std()) < float(static.std()) / 2


def test_a_predictor_refuses_nan_data_and_other_widths(family_models):
    broken = drawn(8, 16)
    broken[2, 3] = math.nan
    with pytest.raises(NumericalError, match="NaN"):
        sparity.fit_activations(broken, method="plan_predictor", sparsity=0.5)
    fitted = sparity.fit_activations(drawn(8, 16), method="plan_predictor", sparsity=0.5)
    with pytest.raises(CorruptFile, match="trained on 16 channels, not 8"):
        fitted.keep(drawn(8, 8))
    place = down_of(family_models["llama"])
    with (
        pytest.raises(CorruptFile, match=f"predictor of {DOWN} was trained on 16 channels"),
        fitted.method.attach(place, fitted.tensors, SparseTokens()),
    ):
        pass
    wrong = {**fitted.tensors, "spread_of_features": torch.zeros(4)}
    with pytest.raises(CorruptFile, match="must be positive"):
        fitted.method.mask(wrong, drawn(1, 8, 16))
    with pytest.raises(InvalidInput, match="ridge -1"):
        registry.build("activations.method", {"plan_predictor": {"ridge": -1.0}})


def test_a_predictor_acts_as_its_mask_says(family_models):
    model = copy.deepcopy(family_models["llama"])
    x = drawn(6, down_of(model).columns)
    fitted = sparity.fit_activations(x, method="plan_predictor", sparsity=0.5)
    found = inputs_behind(model, fitted.method, fitted.tensors, x)
    assert torch.equal(found, torch.where(fitted.keep(x), x, 0))
