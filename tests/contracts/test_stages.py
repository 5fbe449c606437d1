"""The laws of a stage, for every one that the registry finds, alone and in every pair."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_rows import OF_EXPERTS, OF_NO_EXPERTS, ROWS

import sparity
from interruptions import Killed, contents, dies_at
from sparity import registry
from sparity.errors import InvalidInput
from sparity.files import file_hash
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.stages import RuntimeStage
from sparity.stages.order import check_order

STAGES = [name for name in registry.names("stage") if registry.get("stage", name).__module__.startswith("sparity.")]


def recipe_of(token_files, folder, *stages, **sections):
    return Recipe.read(
        {
            "model": str(folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{name: options} for name, options in stages],
            "measure": {"perplexity": [token_files["text"]], "window": 32, "windows": 2, "speed": None},
            **sections,
        }
    )


def something(name):
    return name, ROWS[name][0]


def weights_and_data(folder):
    """Every file that a loader reads."""
    return {name: digest for name, digest in contents(folder).items() if name.endswith((".safetensors", "config.json"))}


def logits(model):
    """Of a prompt and of a token after it, which sees what the cache still holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the last bits of a product depend on where a file's weights begin
    with torch.no_grad():
        prompt = model(torch.arange(40)[None] % 97)
        return torch.cat([prompt.logits, model(torch.tensor([[5]]), past_key_values=prompt.past_key_values).logits], 1)


@pytest.fixture(scope="module")
def folder_of(tiny_llama_folder, tiny_mixtral_folder):
    """Stages -> the folder of a dense model for them: a Llama, or one with experts where a stage needs them."""
    return lambda *names: tiny_mixtral_folder if OF_EXPERTS & set(names) else tiny_llama_folder


@pytest.fixture(scope="module")
def finished(token_files, folder_of, tmp_path_factory):
    """Stage -> the folder of a run of that stage alone."""
    root = tmp_path_factory.mktemp("stages")
    for name in STAGES:
        sparity.run(recipe_of(token_files, folder_of(name), something(name)), output=root / name, device="cpu")
    return root


def test_every_stage_has_a_row():
    assert ROWS.keys() == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_decision_survives_json(name, finished):
    record = json.loads((finished / name / "sparity.json").read_text())
    stage = registry.get("stage", name).model_validate(record["stages"][0]["options"])
    decoder = Decoder.open(finished / name)
    assert record["stages"][0]["name"] == name
    decision = record["stages"][0]["decision"]
    assert decision
    assert json.loads(json.dumps(decision)) == decision
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            assert stage.verify(block, decision) == []


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_resumed_is_bit_identical(name, finished, token_files, folder_of, tmp_path):
    recipe = recipe_of(token_files, folder_of(name), something(name))
    expected = weights_and_data(finished / name)
    died = 0
    for count in itertools.count(2, 3):
        output = tmp_path / str(count)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(recipe, output=output, device="cpu")
                break
            except Killed:
                died += 1
        resumed = sparity.run(recipe, output=output, resume=True, device="cpu")
        assert weights_and_data(resumed.path) == expected
    assert died >= 4


@pytest.mark.parametrize("name", STAGES)
def test_verify_passes_its_own_output_and_catches_a_broken_one(name, finished, tmp_path):
    assert verify(finished / name).problems == ()
    folder = shutil.copytree(finished / name, tmp_path / "copy")
    record = json.loads((folder / "sparity.json").read_text())
    for file in record["files"]:  # a byte more in any file
        with (folder / file).open("ab") as opened:
            opened.write(b" ")
        problems = (
            verify(folder).problems if not file.endswith(".safetensors") or "dynamic" in file else (f"{file}: changed",)
        )
        assert any(file in problem for problem in problems)
        shutil.copyfile(finished / name / file, folder / file)
    shard = folder / "model-00003-of-00004.safetensors"  # a zero more than was recorded, its file's hash put right
    tensors = load_file(shard)
    down = next(key for key in tensors if key.endswith(("mlp.down_proj.weight", "experts.0.w2.weight")))
    weight = tensors[down]
    weight.view(-1)[weight.flatten().nonzero()[0]] = 0.0
    save_file(tensors, shard, {"format": "pt"})
    record["files"][shard.name] = file_hash(shard)
    (folder / "sparity.json").write_text(json.dumps(record))
    assert any(f"{down.removesuffix('.weight')}: sparsity" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("name", STAGES)
def test_the_plans_sizes_are_those_of_the_result(name, finished, token_files, folder_of):
    recipe = recipe_of(token_files, folder_of(name), something(name))
    planned = plan(prepare(recipe, device="cpu"))
    decoder = Decoder.open(finished / name)
    check_plan(planned, decoder, finished / name)


def check_plan(planned, decoder, folder):
    shapes = {
        projection.name: tuple(projection.weight.shape)
        for index in range(len(decoder))
        for site in decoder.sites(index)
        for projection in site.projections
    }
    for change in {change.name: change for stage in planned.stages for change in stage.changes}.values():
        assert change.shape_after == shapes[change.name]
    parameters = sum(torch.Size(shape).numel() for shape in decoder.source.shapes().values())
    assert planned.stages[-1].parameters == parameters
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    headers = 20_000 * (len(decoder) + 1 + len(planned.stages))
    assert planned.output_bytes <= stored <= planned.output_bytes + headers


@pytest.mark.parametrize("name", STAGES)
def test_with_nothing_to_do_the_model_comes_back_bit_for_bit(name, token_files, folder_of):
    recipe = recipe_of(token_files, folder_of(name), (name, ROWS[name][1]))
    result = sparity.run(recipe, device="cpu")
    dense = sparity.load(folder_of(name)).state_dict()
    found = sparity.load(result.path, runtime=False).state_dict()
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in dense.items())
    assert torch.equal(logits(result.model()), logits(sparity.load(folder_of(name))))
    assert result.report.candidates[0].quality[0].kl == 0


@pytest.mark.parametrize("name", [name for name in STAGES if issubclass(registry.get("stage", name), RuntimeStage)])
def test_without_its_data_a_run_time_stage_leaves_the_model_as_it_was(name, finished, folder_of):
    dense = sparity.load(folder_of(name))
    assert torch.equal(logits(sparity.load(finished / name, runtime=False)), logits(dense))
    assert not torch.equal(logits(sparity.load(finished / name)), logits(dense))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(STAGES, STAGES)))
def test_every_pair_is_refused_for_a_reason_or_keeps_what_it_promised(first, second, token_files, folder_of, tmp_path):
    recipe = recipe_of(token_files, folder_of(first, second), something(first), something(second))
    before, after = recipe.stages
    lost = before.relies_on - after.preserves
    if lost:
        with pytest.raises(
            InvalidInput, match=rf"stages\.1 \({second}\) comes after stages\.0 \({first}\), which would"
        ):
            check_order(recipe.stages)
        with pytest.raises(InvalidInput, match="would lose"):
            sparity.run(recipe, output=tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()
        return
    if OF_EXPERTS & {first, second} and OF_NO_EXPERTS & {first, second}:
        with pytest.raises(InvalidInput, match="one of several experts"):
            prepare(recipe, device="cpu")
        return
    result = sparity.run(recipe, output=tmp_path / "out", device="cpu")
    assert verify(result.path).problems == ()
    check_plan(plan(prepare(recipe, device="cpu")), Decoder.open(result.path), result.path)
    candidate = result.report.candidates[0]
    assert candidate.stages == (before.words, after.words)
    assert {change.stage for change in candidate.changes} == {first, second}
    if "mask" in before.relies_on:
        first_zeros = [change.zeros for change in candidate.changes if change.stage == first]
        last_zeros = [change.zeros for change in candidate.totals.outcomes]
        assert min(last_zeros) >= min(first_zeros) - 0.1  # what is cut away may have had more zeros than the rest
