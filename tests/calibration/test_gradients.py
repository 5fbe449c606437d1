"""The reverse walk over stored block inputs against plain autograd over the whole model."""

import copy

import pytest
import torch

from families import tiny_configs
from sparity.calibration import gradients as module
from sparity.calibration.gradients import gather_gradients, gradient_bytes, gradient_file, read_gradients
from sparity.calibration.statistics import OUTPUT_GRAM, WEIGHT_GRADIENTS
from sparity.errors import CorruptFile, InvalidInput, NumericalError
from sparity.models import Decoder

FAMILIES = tuple(tiny_configs())
TOKENS = torch.arange(4 * 18).reshape(4, 18) * 7 % 97


def projections_of(model, decoder):
    """Those of a model in memory, its own modules."""
    names = [decoder.block_name(index) for index in range(len(decoder))]
    sites = [site for n in names for site in decoder.family.sites(model.get_submodule(n), n, model.config)]
    return [projection for site in sites for projection in site.projections]


def output_grams(model, tokens):
    """Projection -> mean of g gT over tokens in float64, by one backward pass of the summed loss each."""
    model = copy.deepcopy(model)
    projections, seen = projections_of(model, Decoder.open(model)), {}

    def see(module, given, output):
        output.retain_grad()
        seen[module] = output

    for read in {projection.module for projection in projections}:
        read.register_forward_hook(see)
    found = {p.name: torch.zeros(len(p.weight), len(p.weight), dtype=torch.float64) for p in projections}
    for ids in tokens:
        (model(ids[None], labels=ids[None], use_cache=False).loss * (len(ids) - 1)).backward()
        for projection in projections:
            slopes = seen[projection.module].grad.flatten(0, -2).double()
            slopes = slopes if projection.rows is None else slopes[:, slice(*projection.rows)]
            found[projection.name] += slopes.T @ slopes / tokens.numel()
    return found


def whole_model_gradients(model, tokens):
    """Projection -> mean and mean square over sequences, by one backward pass of transformers' own loss each."""
    model = copy.deepcopy(model)
    decoder = Decoder.open(model)
    projections = projections_of(model, decoder)
    found = {p.name: [torch.zeros(p.weight.shape, dtype=torch.float64) for _ in WEIGHT_GRADIENTS] for p in projections}
    for ids in tokens:
        model.zero_grad()
        model(ids[None], labels=ids[None], use_cache=False).loss.backward()
        for projection in projections:
            gradient = projection.module.get_parameter(projection.parameter).grad
            if projection.expert is not None:
                gradient = gradient[projection.expert]
            gradient = gradient.T if projection.transposed else gradient
            gradient = gradient if projection.rows is None else gradient[slice(*projection.rows)]
            found[projection.name][0] += gradient.double() / len(tokens)
            found[projection.name][1] += gradient.double() ** 2 / len(tokens)
    return found


def everything(decoder, folder, needs=WEIGHT_GRADIENTS):
    """Projection -> statistic -> tensor of all blocks."""
    found = {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            found.update(read_gradients(gradient_file(folder, block.index), block, needs))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_over_the_whole_model(family_models, family, tmp_path):
    model = family_models[family]
    expected = whole_model_gradients(model, TOKENS)
    decoder = Decoder.open(model)
    gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, tmp_path)
    found = everything(decoder, tmp_path)
    assert found.keys() == expected.keys()
    for name, (mean, square) in expected.items():
        for need, tensor in (("gradient", mean), ("gradient_square", square)):
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                found[name][need].double(), tensor, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert all(mean.abs().max() > 0 for mean, _ in expected.values())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_outputs_equal_autograd_or_are_refused(family_models, family, tmp_path):
    model = family_models[family]
    decoder = Decoder.open(model)
    if any(projection.expert is not None for projection in projections_of(model, decoder)):
        with pytest.raises(InvalidInput, match="gradients at the outputs of experts cannot be seen"):
            gather_gradients(decoder, TOKENS, [OUTPUT_GRAM], tmp_path)
        return
    gather_gradients(decoder, TOKENS, [OUTPUT_GRAM], tmp_path)
    found, expected = everything(decoder, tmp_path, [OUTPUT_GRAM]), output_grams(model, TOKENS)
    assert found.keys() == expected.keys()
    for name, gram in expected.items():
        scale = float(gram.abs().max())
        assert scale > 0
        torch.testing.assert_close(found[name][OUTPUT_GRAM].double(), gram, rtol=1e-4, atol=1e-5 * scale)


def test_a_tied_head_stored_once(tmp_path):
    """Only the embedding lies on disk; the head is its twin."""
    from families import build

    config = tiny_configs()["llama"]
    config.tie_word_embeddings = True
    model = build(config)
    model.save_pretrained(tmp_path / "model")
    decoder = Decoder.open(tmp_path / "model")
    assert "lm_head.weight" not in decoder.source.shapes()
    (tmp_path / "state").mkdir()
    gather_gradients(decoder, TOKENS, ["gradient"], tmp_path / "state")
    found = everything(decoder, tmp_path / "state", ["gradient"])
    for name, (mean, _) in whole_model_gradients(model, TOKENS).items():
        torch.testing.assert_close(found[name]["gradient"].double(), mean, rtol=1e-4, atol=1e-6)


def test_an_expert_without_tokens_has_gradient_zero(family_models, tmp_path):
    model = copy.deepcopy(family_models["mixtral"])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # equal logits: two experts take every token
    decoder = Decoder.open(model)
    gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, tmp_path)
    found = everything(decoder, tmp_path)
    silent = [f"model.layers.1.block_sparse_moe.experts.{e}.w1" for e in range(4)]
    assert sum(bool((found[name]["gradient_square"] == 0).all()) for name in silent) == 2
    assert all(torch.isfinite(tensor).all() for kinds in found.values() for tensor in kinds.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_computes_in_its_type_and_sums_in_float32(family_models, tmp_path, dtype, tolerance):
    model = family_models["llama"]
    decoder = Decoder.open(model, dtype=dtype)
    gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, tmp_path)
    found = everything(decoder, tmp_path)
    for name, (mean, _) in whole_model_gradients(model, TOKENS).items():
        got = found[name]["gradient"]
        assert got.dtype == torch.float32
        assert (got.double() - mean).norm() < tolerance * mean.norm(), name


class Killed(BaseException):
    """Stands for the process's end."""


def test_stopped_before_every_write_and_continued(family_models, tmp_path, monkeypatch):
    decoder = Decoder.open(family_models["gpt2"])
    whole = tmp_path / "whole"
    whole.mkdir()
    gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, whole)
    assert sorted(path.name for path in whole.iterdir()) == [f"gradients-{i}.safetensors" for i in range(3)]
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    save, died = module._save, 0
    for count in range(1, 50):
        folder, left = tmp_path / str(count), [count]
        folder.mkdir()

        def dies(path, tensors, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            save(path, tensors)

        monkeypatch.setattr(module, "_save", dies)
        try:
            gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, folder)
            break
        except Killed:
            died += 1
        gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert died == 3 + 1 + 3 + 2  # inputs, the gradient at the head, results, gradients between blocks


def test_finished_blocks_are_not_done_again(family_models, tmp_path, monkeypatch):
    decoder = Decoder.open(family_models["llama"])
    go_back, done = module._go_back, []

    def watched(block, *rest):
        if block.index == 0 and len(done) == 2:
            raise Killed
        done.append(block.index)
        return go_back(block, *rest)

    monkeypatch.setattr(module, "_go_back", watched)
    with pytest.raises(Killed):
        gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, tmp_path)
    done.append("again")
    gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, tmp_path)
    gather_gradients(decoder, TOKENS, WEIGHT_GRADIENTS, tmp_path)
    assert done == [2, 1, "again", 0]


@pytest.mark.parametrize("needs", [("gradient",), ("gradient_square",), WEIGHT_GRADIENTS, (OUTPUT_GRAM,)])
def test_the_bytes_on_disk_are_those_that_are_stated(family_models, tmp_path, monkeypatch, needs):
    decoder = Decoder.open(family_models["llama"])
    save, most = module._save, [0]

    def weighed(path, tensors):
        save(path, tensors)
        most[0] = max(most[0], sum(file.stat().st_size for file in tmp_path.iterdir()))

    monkeypatch.setattr(module, "_save", weighed)
    gather_gradients(decoder, TOKENS, needs, tmp_path)
    stated = gradient_bytes(decoder, *TOKENS.shape, needs)
    headers = 30 * 1024
    assert most[0] <= stated + headers
    results = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert results == pytest.approx(stated - 5 * 4 * 18 * 32 * 4, abs=headers)
    assert gradient_bytes(decoder, *TOKENS.shape, ()) == 0


def test_bad_input(family_models, tmp_path):
    decoder = Decoder.open(family_models["llama"])
    with pytest.raises(InvalidInput, match="at least 3 tokens, got 2"):
        gather_gradients(decoder, TOKENS[:, :2], WEIGHT_GRADIENTS, tmp_path)
    with decoder.block(0) as block, pytest.raises(CorruptFile, match=r"gradients-0\.safetensors is missing or damaged"):
        read_gradients(gradient_file(tmp_path, block.index), block, WEIGHT_GRADIENTS)
    broken = copy.deepcopy(family_models["llama"])
    with torch.no_grad():
        broken.lm_head.weight.fill_(1e30)
        broken.model.norm.weight.fill_(1e30)
    with pytest.raises(NumericalError, match="the loss of calibration sample 0 is NaN or infinite"):
        gather_gradients(Decoder.open(broken), TOKENS, WEIGHT_GRADIENTS, tmp_path)


def test_a_gradient_that_overflows(family_models, tmp_path):
    steep = copy.deepcopy(family_models["llama"])
    with torch.no_grad():
        steep.model.norm.weight.fill_(1e25)  # the loss is finite, its square in float32 is not
    with pytest.raises(NumericalError, match=r"model\.layers\.2\..*: the gradient of the loss holds NaN or infinite"):
        gather_gradients(Decoder.open(steep), TOKENS, WEIGHT_GRADIENTS, tmp_path)
