"""Forward and backward passes with float32 products: what is computed, where, and that nothing else is touched."""

import copy

import pytest
import torch
from torch.nn.functional import linear

import sparity
from sparity.calibration.gradients import gather_gradients, gradient_file, read_gradients
from sparity.calibration.regional import regional_gradients
from sparity.models import Decoder
from sparity.products import float32, panels
from sparity.products.float32 import float32_products
from sparity.quality.perplexity import window_logits


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Also for as few tokens as tests have."""
    monkeypatch.setenv("SPARITY_PRODUCTS", "float32")
    monkeypatch.setattr(panels, "FEW", 0)


@pytest.fixture
def counted(monkeypatch):
    """The products that went by way of float32, by name."""
    seen = []

    def watched(name, compute):
        return lambda *operands: seen.append(name) or compute(*operands)

    monkeypatch.setattr(
        float32, "PRODUCTS", {func: watched(func.overloadpacket.__name__, f) for func, f in float32.PRODUCTS.items()}
    )
    return seen


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def once(*operands, compute):
    """What `compute` gives in float64, and the bound of one rounding to bfloat16."""
    exact = compute(*(x.double() for x in operands))
    size = compute(*(x.double().abs() for x in operands))
    return exact, exact.abs() * 2**-8 + size * 2**-18


CASES = {
    "mm": (lambda x, y: x @ y, (drawn(7, 20), drawn(20, 30, seed=1))),
    "linear": (linear, (drawn(2, 7, 20), drawn(30, 20, seed=1))),
    "biased": (linear, (drawn(2, 7, 20), drawn(30, 20, seed=1), drawn(30, seed=2))),
    "conv1d": (torch.addmm, (drawn(30, seed=2), drawn(7, 20), drawn(20, 30, seed=1))),
    "bmm": (lambda x, y: x @ y, (drawn(2, 3, 7, 20), drawn(2, 3, 20, 5, seed=1))),
    "baddbmm": (torch.baddbmm, (drawn(7, 5), drawn(3, 7, 20), drawn(3, 20, 5, seed=1))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_product_is_rounded_once(name, mode, counted):
    compute, operands = CASES[name]
    exact, bound = once(*operands, compute=compute)
    with mode(), float32_products():
        found = compute(*operands)
    assert found.dtype == torch.bfloat16
    assert len(counted) == 1
    assert ((found.double() - exact).abs() <= bound).all()


def test_large_batches_are_taken_in_parts(monkeypatch):
    x, y = drawn(5, 7, 20), drawn(5, 20, 6, seed=1)
    with float32_products():
        whole = torch.bmm(x, y)
        monkeypatch.setattr(panels, "PANEL", 1)
        assert torch.equal(torch.bmm(x, y), whole)
        assert torch.bmm(x[:0], y[:0]).shape == (0, 7, 6)


def test_experts_get_their_own_tokens(counted):
    x, weight = drawn(10, 16).requires_grad_(), drawn(3, 16, 8, seed=1).requires_grad_()
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)  # the second has none, and the last token no expert
    with torch.enable_grad(), float32_products():
        found = torch.nn.functional.grouped_mm(x, weight, offs=ends)
        found[:9].float().sum().backward()
    assert counted == ["_grouped_mm"] * 3
    for part, expert in ((slice(0, 4), 0), (slice(4, 9), 2)):
        exact, bound = once(x[part].detach(), weight[expert].detach(), compute=torch.matmul)
        assert ((found[part].double() - exact).abs() <= bound).all()
        assert torch.allclose(weight.grad[expert].float(), x[part].float().sum(0)[:, None].expand(16, 8), rtol=2**-7)
    assert torch.equal(weight.grad[1], torch.zeros(16, 8))


def test_other_types_and_few_tokens_stay_as_they_are(counted, monkeypatch):
    wide = drawn(7, 20, dtype=torch.float32), drawn(20, 30, dtype=torch.float32, seed=1)
    whole = torch.ones(2, 2, dtype=torch.int64)
    with float32_products():
        assert torch.equal(wide[0] @ wide[1], torch.mm(*wide))
        assert torch.equal(whole @ whole, 2 * whole)
    assert counted == []
    few = drawn(8, 20), drawn(20, 30, seed=1)
    monkeypatch.setattr(panels, "FEW", 8)
    monkeypatch.setattr(panels, "multiply", lambda *a: pytest.fail("went by way of float32"))
    with float32_products():
        torch.mm(*few)


def test_where_the_processor_is_fast_nothing_is_changed(counted, monkeypatch):
    monkeypatch.setenv("SPARITY_PRODUCTS", "own")
    x, y = drawn(7, 20), drawn(20, 30, seed=1)
    with float32_products():
        assert torch.equal(x @ y, torch.mm(x, y))
    assert counted == []


def test_the_way_back_is_computed_so_too(counted):
    x, weight = drawn(7, 20).requires_grad_(), drawn(30, 20, seed=1).requires_grad_()
    with torch.enable_grad(), float32_products():
        linear(x, weight).float().square().sum().backward()
    assert counted == ["mm"] * 3
    wide = [x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    with torch.enable_grad():
        linear(*wide).square().sum().backward()
    for ours, theirs in zip((x, weight), wide, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        error = (ours.grad.float() - theirs.grad).abs()
        assert (error <= 2**-6 * theirs.grad.abs() + 2**-6 * theirs.grad.abs().mean()).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_every_pass_of_a_model_uses_them(family, family_models, counted, tmp_path):
    model = copy.deepcopy(family_models[family]).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    decoder = Decoder.open(model)
    inputs = decoder.inputs(tokens)

    def products_of(work):
        counted.clear()
        work()
        return len(counted)

    with decoder.block(0) as block:
        hidden = inputs.hidden.clone()
        least = len({p.stored.data_ptr() for p in block.projections})
        assert products_of(lambda: block.run(inputs, hidden, into=hidden)) >= least
        assert products_of(lambda: regional_gradients(block, inputs, inputs.hidden)) >= 3 * least
    assert products_of(lambda: gather_gradients(decoder, tokens, {"gradient"}, tmp_path)) >= 3 * least
    assert products_of(lambda: window_logits(model, tokens[0])) >= least * len(decoder)
    with decoder.block(0) as block:
        assert read_gradients(gradient_file(tmp_path, 0), block, {"gradient"})
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_gives_the_same_within_the_noise_of_its_type(monkeypatch):
    """Float32 products move predictions no further from the float32 model's than bfloat16 ones do, within a quarter."""
    model = sparity.load("zoo:llama", dtype="bfloat16")
    ids = torch.randint(0, 8000, (96,), generator=torch.Generator().manual_seed(0))
    ours = window_logits(model, ids).log_softmax(-1)
    monkeypatch.setenv("SPARITY_PRODUCTS", "own")
    own = window_logits(model, ids).log_softmax(-1)
    exact = window_logits(model.float(), ids).log_softmax(-1)

    def divergence(p, q):
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert 0 < divergence(own, ours) < divergence(exact, own) * 2
    assert divergence(exact, ours) < divergence(exact, own) * 1.25
