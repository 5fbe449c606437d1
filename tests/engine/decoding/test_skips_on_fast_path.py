"""Models that skip channels decode on the fast path, and give what their hooks give."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import sparity
from families import FAST, build, tiny_configs
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.stage import Activations
from sparity.dynamic.speculate.exact import generate_exact
from sparity.engine.decoding.fast_path import Step
from sparity.engine.decoding.model import declines, fallbacks
from sparity.engine.kernels import native
from sparity.engine.modules.by_channel import least
from sparity.engine.modules.linear import PackedLinear
from sparity.engine.modules.skips import tokens_of
from sparity.errors import InvalidInput
from sparity.formats import build_encoding, unpack
from sparity.models.attached_runtime import input_sites

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
IDS = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    return build(LlamaConfig(**{**tiny_configs()["llama"].to_dict(), **FAST["llama"]})).bfloat16().eval()


def steps(model, rows=2, count=6):
    """The logits of a prompt and of some tokens after it, and how many single steps were not on the fast path."""
    cache, found = DynamicCache(), []
    with torch.no_grad():
        found.append(model(IDS[:rows], past_key_values=cache).logits)
        before = sum(fallbacks(model).values())
        for token in range(count):
            found.append(model(IDS[:rows, token : token + 1], past_key_values=cache).logits)
    return torch.cat(found, 1).float(), sum(fallbacks(model).values()) - before


@pytest.mark.parametrize("form", ["dense", "smallest"])
def test_single_steps_are_the_hooks_own_but_for_rounding(model, form):
    """Half of the channels never count, so that no rounding decides which do."""
    sites, generator = input_sites(model), torch.Generator().manual_seed(1)
    data = {}
    for place in places_of(model, sites, "all"):
        never = torch.rand(place.columns, generator=generator) < 0.5
        data[f"{place.name}.threshold"] = torch.zeros(place.columns).masked_fill(never, torch.inf)
    with Activations(sparsity=0.5).attach(model, sites, data):
        expected, _ = steps(model)
        with sparity.attached(model, form=form):
            assert declines(model) is None
            found, others = steps(model)
            formats = {m.packed.format for m in model.modules() if isinstance(m, PackedLinear)}
    assert formats == ({"columns"} if form == "smallest" else set())
    assert others == 0
    assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())
    dense, _ = steps(model)
    assert float((found[:, 24:] - dense[:, 24:]).abs().max()) > 0.2 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("teal", {}),
        ("rms", {"sites": ["o", "down"]}),
        ("wina", {}),
        ("statistical_topk", {}),
        ("thresholds", {"centre": "mean"}),
        ("cats", {"sites": "gate_output"}),
    ],
)
def test_every_scale_of_a_rule_runs_on_the_fast_path(model, method, options):
    with sparity.with_activations(model, IDS, method=method, sparsity=0.02, **options):
        expected, _ = steps(model)
        with sparity.attached(model):
            found, others = steps(model)
    assert others == 0
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("values", ["same", "int8", "int4"])
def test_weights_lie_by_column_where_enough_is_skipped(model, values, by_columns):
    sparsity = least(build_encoding(values)) - (0 if by_columns else 0.01)
    with sparity.with_activations(model, IDS, method="teal", sparsity=sparsity), sparity.attached(model, values=values):
        packed = [module.packed.format for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed.count("columns") == (7 * len(model.model.layers) if by_columns else 0)


def test_from_which_share_on_weights_lie_by_column():
    shares = {}
    for name in native.instruction_sets():
        with native.using(name):
            shares[name] = [least(build_encoding(values)) for values in ("same", "int8", "int4")]
    assert all(found == [0.1, 0.1, 0.65 if name == "avx512_bf16" else 0.5] for name, found in shares.items())


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_packed_model_is_laid_out_anew_behind_its_skips_with_the_same_weights(model, values):
    with sparity.attached(model, values=values):
        packed = {name: module.packed for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        with sparity.with_activations(model, IDS, method="teal", sparsity=0.7):
            with sparity.attached(model):
                again = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
                assert {module.packed.format for module in again.values()} == {"columns"}
                assert all(torch.equal(module.weight, unpack(packed[name])) for name, module in again.items())
                _, others = steps(model)
                assert others == 0
            found = [module.packed for module in model.modules() if isinstance(module, PackedLinear)]
    assert found == list(packed.values())


def test_skips_that_come_and_go_are_noticed(model):
    with sparity.attached(model):
        dense, _ = steps(model)
        with sparity.with_activations(model, IDS, method="teal", sparsity=0.5):
            sparse, others = steps(model)
            assert others == 0
        again, _ = steps(model)
    assert torch.equal(again, dense)
    assert not torch.equal(sparse, dense)


def test_the_first_tokens_are_dense_in_every_row(model, monkeypatch):
    seen = []
    whole = Step.__call__

    def watched(self, *arguments):
        found = whole(self, *arguments)
        seen.append(self._tokens.between(arguments[4], arguments[0].shape[1]))
        return found

    monkeypatch.setattr(Step, "__call__", watched)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    with (
        sparity.with_activations(model, IDS, method="teal", sparsity=0.5, first=5),
        sparity.attached(model),
        torch.no_grad(),
    ):
        model.generate(IDS[:2, :6], attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    flags = [None if found is None else found.flatten().tolist() for found in seen]
    assert flags == [[False] * 12, [True, False], [True, False], None]


@pytest.mark.parametrize("values", ["same", "int8"])
def test_what_is_left_out_counts_as_the_centre(model, values):
    """Half of the channels never count; the others do, so that no rounding decides which. The first token is dense."""
    sites, generator = input_sites(model), torch.Generator().manual_seed(1)
    data = {}
    for place in places_of(model, sites, "all"):
        never = torch.rand(place.columns, generator=generator) < 0.5
        data[f"{place.name}.threshold"] = torch.zeros(place.columns).masked_fill(never, torch.inf)
        data[f"{place.name}.centre"] = torch.randn(place.columns, generator=generator) * 0.5
    dense, _ = steps(model)
    with Activations(sparsity=0.5, first=25).attach(model, sites, data):
        expected, _ = steps(model)
        with sparity.attached(model, form="dense", values=values):
            assert declines(model) is None
            found, others = steps(model)
    assert others == 0
    assert float((found - expected).abs().max()) <= (0.03 if values == "same" else 0.1) * float(expected.abs().max())
    assert float((found[:, 25:] - dense[:, 25:]).abs().max()) > 0.2 * float(dense.abs().max())
    if values == "same":
        assert torch.equal(expected[:, :25], dense[:, :25])


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_neurons_that_the_gate_leaves_small_are_not_read(model, share):
    """Cats: down lies by column; the neurons that count are those that the hook keeps."""
    sites = input_sites(model)
    places = places_of(model, sites, "gate_output")
    never = torch.rand(places[0].columns, generator=torch.Generator().manual_seed(1)) < share
    data = {f"{p.name}.threshold": torch.zeros(p.columns).masked_fill(never, torch.inf) for p in places}
    with Activations(method="cats", sparsity=share).attach(model, sites, data):
        expected, _ = steps(model)
        with sparity.attached(model):
            assert declines(model) is None
            found, others = steps(model)
            packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert others == 0
    assert packed == [f"model.layers.{layer}.mlp.down_proj" for layer in range(len(model.model.layers))]
    assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())


def test_several_stages_share_the_fast_path_unless_their_tokens_differ(model):
    def teal(site, **options):
        return sparity.with_activations(model, IDS, method="teal", sparsity=0.02, sites=[site], **options)

    with sparity.attached(model):
        with teal("q"), teal("down"):
            found, others = steps(model)
            assert others == 0
        with teal("q"), teal("down", first=5):
            assert declines(model) == "stages skip channels of different tokens"
        assert declines(model) is None
    with teal("q"), teal("down"):
        expected, _ = steps(model)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def test_outputs_around_a_centre_run_the_models_own_code(model):
    sites = input_sites(model)
    place = places_of(model, sites, "gate_output")[0]
    data = {f"{place.name}.threshold": torch.ones(place.columns), f"{place.name}.centre": torch.ones(place.columns)}
    data |= {f"{p.name}.threshold": torch.tensor(0.0) for p in places_of(model, sites, "gate_output")[1:]}
    with Activations(method="cats", sparsity=0.5).attach(model, sites, data), sparity.attached(model):
        assert declines(model) == "what layers.0.mlp.act_fn gives is skipped around a centre"


@pytest.mark.parametrize("draft", [1, 4, 9])
def test_exact_mode_gives_the_dense_models_tokens(model, draft):
    model.generation_config.eos_token_id = None
    with sparity.with_activations(model, IDS, method="teal", sparsity=0.6), sparity.attached(model):
        for prompt in IDS:
            with tokens_of(model).dense():
                expected = model.generate(prompt[None], max_new_tokens=24, do_sample=False)
            found = generate_exact(model, prompt, max_new_tokens=24, draft=draft, eos_token_id=())
            assert torch.equal(found.ids, expected)
            assert 0 <= found.accepted <= found.drafted
            assert found.checks + found.accepted >= 23
            assert found.acceptance == (found.accepted / found.drafted if found.drafted else 0)


def test_exact_mode_ends_where_the_dense_model_ends(model):
    with sparity.with_activations(model, IDS, method="teal", sparsity=0.3), sparity.attached(model):
        free = generate_exact(model, IDS[0], max_new_tokens=20, eos_token_id=()).ids[0, 24:].tolist()
        end = free[7]
        found = generate_exact(model, IDS[0], max_new_tokens=20, eos_token_id=end)
    assert found.ids[0, 24:].tolist() == free[: free.index(end) + 1]


def test_exact_mode_says_what_it_needs(model):
    with pytest.raises(InvalidInput, match="this model skips none"):
        generate_exact(model, IDS[0], max_new_tokens=2)
    with sparity.with_activations(model, IDS, method="teal", sparsity=0.3):
        with pytest.raises(InvalidInput, match="not attached to the engine"):
            generate_exact(model, IDS[0], max_new_tokens=2)
        with sparity.attached(model):
            for options, words in (
                ({"draft": 0}, "draft 1 to 31"),
                ({"draft": 32}, "draft 1 to 31"),
                ({"max_new_tokens": 0}, "ask for 1 or more"),
                ({"input_ids": IDS}, r"one prompt.*not \[4, 24\]"),
            ):
                with pytest.raises(InvalidInput, match=words):
                    generate_exact(model, **{"input_ids": IDS[0], "max_new_tokens": 2, **options})
