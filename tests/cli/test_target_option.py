"""`sparity plan --target`: whether the result will load elsewhere, said before anything is cut."""

import pytest
import yaml

import sparity as library
from families import build, tiny_configs

STRUCTURE = {"method": "flap", "sparsity": 0.3, "shapes": "ragged"}


@pytest.fixture
def plan(sparity, tmp_path, token_files, tiny_llama_folder):
    def plan(target, *stages, model=tiny_llama_folder, **sections):
        path = tmp_path / "recipe.yaml"
        asked = {
            "model": str(model),
            "calibration": {"tokens": str(token_files["calibration"])},
            "stages": list(stages),
            "measure": {"perplexity": [], "speed": None},
            **sections,
        }
        path.write_text(yaml.safe_dump(asked))
        return sparity("plan", path, "--target", target, "--json").json["target"]

    return plan


def said(found):
    return found["loads"], " ".join((found["how"], *found["reasons"], *found["notes"]))


def test_one_size_for_all_blocks_loads_everywhere_and_gains_by_its_bytes(plan):
    cut = {"structure": {"method": {"magnitude": {"dimension": "depth"}}, "sparsity": 0.34}}
    for target in ("transformers", "llama.cpp", "vllm"):
        found = plan(target, cut)
        assert found["loads"] == "yes"
        assert found["gain"] == found["bytes_before"] / found["bytes_after"] > 1.2
        assert not found["about"]
    assert "sparity convert OUT OUT.gguf" in said(plan("llama.cpp", cut))[1]


def test_blocks_that_differ_load_in_llama_cpp_alone(plan):
    cut = {"structure": STRUCTURE}
    assert said(plan("transformers", cut)) == (
        "no",
        "sparity.load opens it transformers keeps `per_layer_config` but builds all blocks from one size",
    )
    loads, words = said(plan("llama.cpp", cut))
    assert loads == "yes"
    assert "architecture deci" in words
    assert "are no multiple of 32: Q8_0, Q4_0 and Q4_1 leave those matrices larger" in words
    assert plan("llama.cpp", cut)["about"]
    assert said(plan("vllm", cut))[0] == "no"


def test_zeros_packing_and_run_time_stages_are_spoken_of(plan):
    zeros = plan("llama.cpp", {"prune": {"score": "magnitude"}})
    assert zeros["gain"] == 1.0
    assert "zeros are stored and computed like other numbers there" in zeros["reasons"]
    packed = {"output": {"format": "packed"}}
    assert "after `import sparity`" in plan("transformers", {"prune": {"score": "magnitude"}}, **packed)["how"]
    assert "Sparity's plug-in" in plan("vllm", {"prune": {"score": "magnitude"}}, **packed)["how"]
    assert "as the dense ones" in said(plan("llama.cpp", {"prune": {"score": "magnitude"}}, **packed))[1]
    runtime = {"activations": {"sparsity": 0.4}}
    assert "after `import sparity`" in plan("transformers", runtime)["how"]
    assert "(activations) are Sparity's own: weights only" in said(plan("vllm", runtime))[1]


def test_what_nobody_has_tried_is_not_known(plan, tmp_path):
    config = tiny_configs()["phi3"]
    config.head_dim = 8
    for name, model in (("opt", build(tiny_configs()["opt"])), ("phi3", build(config))):
        model.save_pretrained(tmp_path / name)
    nothing = {"prune": {"score": "magnitude"}}
    assert said(plan("llama.cpp", nothing, model=tmp_path / "opt"))[0] == "unknown"
    assert said(plan("vllm", nothing, model=tmp_path / "opt"))[0] == "yes"
    assert "convert_hf_to_gguf" in said(plan("llama.cpp", nothing, model=tmp_path / "phi3"))[1]
    heads = {"structure": {"method": {"magnitude": {"dimension": "kv_groups"}}, "sparsity": 0.5}}
    loads, words = said(plan("vllm", heads, model=tmp_path / "phi3"))
    assert loads == "unknown"
    assert "heads of 8 that do not make up the hidden size of 32" in words


def test_it_is_printed_and_another_program_is_refused(sparity, recipe_file):
    recipe = recipe_file({"score": "magnitude"})
    assert "vllm: loads" in sparity("plan", recipe, "--target", "vllm").out
    assert "one of transformers, llama.cpp, vllm" in sparity("plan", recipe, "--target", "vlm").err


def test_a_ragged_recipe_runs_to_a_checkpoint_and_a_gguf_file(sparity, tmp_path, tiny_llama_folder, token_files):
    import gguf

    stages = [{"structure": STRUCTURE}, {"prune": {"score": "magnitude", "sparsity": 0.5}}]
    asked = {"model": str(tiny_llama_folder), "calibration": {"tokens": str(token_files["calibration"])}}
    asked |= {"stages": stages, "measure": {"perplexity": [], "speed": None}}
    result = library.run(asked, output=tmp_path / "out", device="cpu")
    config = result.model().config
    assert config.is_heterogeneous
    widths = [config.per_layer_config[index].intermediate_size for index in range(3)]
    assert len(set(widths)) > 1
    sparity("verify", tmp_path / "out")
    sparity("convert", tmp_path / "out", tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["deci.feed_forward_length"].contents() == widths
    again = {**asked, "model": str(tmp_path / "out"), "stages": [{"structure": {"sparsity": 0.5}}]}
    with pytest.raises(library.errors.InvalidInput, match="have different sizes already"):
        library.run(again, output=tmp_path / "again", device="cpu")
