"""The stage `quantize`: what `plan` refuses, experts without tokens, what lies beside the weights, and what follows."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sparity
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe

GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group": 8, "symmetric": False}}


def recipe_of(token_files, *stages):
    return Recipe.read(
        {
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": list(stages),
            "measure": {"speed": None},
        }
    )


def weights_of(folder):
    """Projection -> its weight."""
    decoder, found = Decoder.open(folder), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            found.update({projection.name: projection.weight.clone() for projection in block.projections})
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"group": 24},
            "model.layers.0.self_attn.q_proj: a group of 24 does not divide its row of 32 weights; choose 16",
        ),
        ({"method": "slim_llm", "grid": "nf4"}, "needs integers of 3 to 7 bits, not NF4"),
        ({"grid": "nf4", "bits": 3}, "NF4 has 4; leave bits out"),
        ({"bits": 9}, "2 to 8 bits"),
        ({"method": "gptk"}, 'did you mean "gptq"'),
        ({"dense": ["model.layers.9.*"]}, 'dense: "model.layers.9.*" matches no projection'),
        ({"method": "gptq", "order": "independent", "true_sequential": True}, "needs `order: sequential`"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options, words, token_files, tiny_llama_folder):
    with pytest.raises(InvalidInput) as caught:
        prepare(recipe_of(token_files, {"quantize": options}), str(tiny_llama_folder), "cpu")
    assert words in str(caught.value)


def test_a_method_that_reads_inputs_needs_calibration(tiny_llama_folder):
    recipe = Recipe.read({"stages": [GPTQ], "measure": {"speed": None}})
    with pytest.raises(InvalidInput, match="calibration"):
        prepare(recipe, str(tiny_llama_folder), "cpu")


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_matrices_that_lie_otherwise_are_quantised_like_any_other(family, family_models, token_files, tmp_path):
    stage = {"quantize": {"method": "nearest", "bits": 3, "group": 8, "symmetric": False}}
    result = sparity.run(
        recipe_of(token_files, stage), model=family_models[family], output=tmp_path / "out", device="cpu"
    )
    dense = Decoder.open(family_models[family])
    found = weights_of(result.path)
    assert found
    for index in range(len(dense)):
        with dense.block(index) as block:
            for projection in block.projections:
                expected = sparity.quantize_weight(projection.weight, bits=3, group=8, symmetric=False).weight
                assert torch.equal(found[projection.name], expected), projection.name


def test_a_projection_that_is_left_out_stays_as_it_is(token_files, tiny_llama_folder, tmp_path):
    options = {**GPTQ["quantize"], "dense": ["*.down_proj", "*.0.self_attn.q_proj"]}
    result = sparity.run(
        recipe_of(token_files, {"quantize": options}),
        model=str(tiny_llama_folder),
        output=tmp_path / "out",
        device="cpu",
    )
    before, after = weights_of(tiny_llama_folder), weights_of(result.path)
    same = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert same == {name for name in before if name.endswith("down_proj") or ".0.self_attn.q" in name}
    changes = {change.name: change.bits for change in result.report.candidates[0].changes}
    assert {name for name, bits in changes.items() if bits is None} == same
    assert {bits for bits in changes.values() if bits} == {4 + 36 / 8}


def test_an_expert_without_tokens_is_an_error_or_rounded_or_left(family_models, tmp_path, caplog):
    np.save(tmp_path / "one.npy", np.full((1, 2), 5))
    calibration = {"tokens": str(tmp_path / "one.npy")}
    dense = {name: weight for name, weight in family_models["mixtral"].state_dict().items() if "experts" in name}

    def run(choice):
        stages = [{"quantize": {**GPTQ["quantize"], "unseen_expert": choice}}]
        recipe = Recipe.read({"calibration": calibration, "stages": stages, "measure": {"speed": None}})
        result = sparity.run(recipe, model=family_models["mixtral"], output=tmp_path / choice, device="cpu")
        return {change.name: change.bits for change in result.report.candidates[0].changes if "experts" in change.name}

    assert dense
    with pytest.raises(NumericalError, match="no calibration token was routed to this expert; calibrate on more"):
        run("error")
    assert None not in run("nearest").values()
    assert "treated by: nearest" in caplog.text
    assert None in run("dense").values()


def test_scales_lie_beside_the_weights_through_passes_and_conversions(token_files, tiny_llama_folder, tmp_path):
    """`activations` opens a pass of its own here: its budget reads the whole model that `quantize` has left."""
    stages = ({"prune": {"pattern": "2:4"}}, GPTQ, {"activations": {"sparsity": 0.3, "budget": "owl"}})
    result = sparity.run(
        recipe_of(token_files, *stages), model=str(tiny_llama_folder), output=tmp_path / "out", device="cpu"
    )
    name = "sparity-scales/01-quantize.safetensors"
    assert verify(result.path).problems == ()
    kept, weights = load_file(result.path / name), weights_of(result.path)
    assert {key.rpartition(".")[0] for key in kept} == set(weights)
    for projection, weight in weights.items():
        scales, zeros = (kept[f"{projection}.{part}"].float().repeat_interleave(8, 1) for part in ("scales", "zeros"))
        codes = weight / scales + zeros
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert 0 <= codes.round().min() <= codes.round().max() <= 15
        assert ((weight != 0).view(len(weight), -1, 4).sum(2) <= 2).all()
    convert(result.path, tmp_path / "packed")
    assert (tmp_path / "packed" / name).read_bytes() == (result.path / name).read_bytes()
    assert verify(tmp_path / "packed").problems == ()


def test_verify_sees_a_weight_that_is_no_value_of_its_group(token_files, tiny_llama_folder, tmp_path):
    stage = Recipe.read({"stages": [{"quantize": {"bits": 2, "group": 32}}]}).stages[0]
    result = sparity.run(
        recipe_of(token_files, {"quantize": {"bits": 2, "group": 32}}),
        model=str(tiny_llama_folder),
        output=tmp_path / "out",
        device="cpu",
    )
    decoder = Decoder.open(result.path)
    decision = stage.decide(decoder, None)
    with decoder.block(0) as block:
        assert stage.verify(block, decision) == []
        block.projections[0].weight[3, :2] = torch.tensor([0.0123, 0.0345])
        (problem,) = stage.verify(block, decision)
    assert problem == "model.layers.0.self_attn.q_proj: 1 groups have more than 4 values"
