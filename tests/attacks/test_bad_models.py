"""Model folders that are damaged, hostile or not what they seem: refused before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparity
from sparity.errors import CorruptFile, InvalidInput, NumericalError, UnsupportedModel

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def split(folder):
    """Turn the one file of a model into two shards with an index; returns the index."""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(tensors)
    homes = {name: SHARDS[position > 8] for position, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in names if homes[name] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": homes}))
    return homes


def change_weights(folder, change):
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE, {"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused_everywhere(refused, recipe, folder, error, *parts):
    """Neither `run` nor `load` takes the folder."""
    refused({**recipe(), "model": str(folder)}, error, *parts)
    with pytest.raises(sparity.SparityError) as caught:
        sparity.load(folder)
    assert type(caught.value) is error


def test_shards_are_read(recipe, model_copy, tmp_path, tiny_llama_folder):
    split(model_copy)
    shards = sparity.run({**recipe(), "model": str(model_copy)}, output=tmp_path / "shards").model()
    whole = sparity.run(recipe(), output=tmp_path / "whole").model()
    assert all(torch.equal(a, b) for a, b in zip(shards.parameters(), whole.parameters(), strict=True))


def test_a_missing_shard(recipe, model_copy, refused):
    split(model_copy)
    (model_copy / SHARDS[1]).unlink()
    refused_everywhere(refused, recipe, model_copy, CorruptFile, f"{model_copy}: missing shards {SHARDS[1]}; fetch")


@pytest.mark.parametrize("kept", [0, 5, 60, -100])
def test_a_truncated_shard(recipe, model_copy, refused, kept):
    content = (model_copy / WHOLE).read_bytes()
    (model_copy / WHOLE).write_bytes(content[:kept])
    refused_everywhere(refused, recipe, model_copy, CorruptFile, f"{WHOLE} is truncated or damaged .*fetch or save")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"model.ghost.weight": SHARDS[0]}, r"lists 1 tensors that no shard holds, model\.ghost\.weight among them"),
        ({"model.ghost.weight": "../../etc/passwd"}, r"names '\.\./\.\./etc/passwd', which is not a file of this"),
        ({"model.ghost.weight": "/etc/passwd"}, "names '/etc/passwd', which is not a file of this folder"),
        ({"model.ghost.weight": ".."}, r"names '\.\.', which is not a file"),
        ({"model.ghost.weight": 5}, "names 5, which is not a file"),
        ({"model.ghost.weight": "x" * 5000}, "missing shards xxx"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_an_index_that_lies(recipe, model_copy, refused, entry, words):
    homes = split(model_copy)
    (model_copy / INDEX).write_text(json.dumps({"weight_map": {**homes, **entry}}))
    refused_everywhere(refused, recipe, model_copy, CorruptFile, words)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}', "[" * 100_000])
def test_an_index_that_is_none(recipe, model_copy, refused, content):
    split(model_copy)
    (model_copy / INDEX).write_text(content)
    refused_everywhere(refused, recipe, model_copy, CorruptFile, "is not a shard index .*fetch or save")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_never_filled_at_random(recipe, model_copy, refused, name):
    change_weights(model_copy, lambda tensors: tensors.pop(name))
    refused_everywhere(refused, recipe, model_copy, CorruptFile, f"lacks 1 tensors of the model, {name} among them")


def test_a_tied_head_may_be_absent(recipe, model_copy, tmp_path):
    change_config(model_copy, tie_word_embeddings=True)
    change_weights(model_copy, lambda tensors: tensors.pop("lm_head.weight"))
    model = sparity.run({**recipe(), "model": str(model_copy)}, output=tmp_path / "out").model()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"hidden_size": 64}, CorruptFile, r"model\.embed_tokens\.weight .*shape"),
        ({"vocab_size": 98}, CorruptFile, r"model\.embed_tokens\.weight .*shape|lm_head\.weight .*shape"),
        ({"num_hidden_layers": 4}, CorruptFile, r"lacks 9 tensors of the model"),
        ({"vocab_size": 10**13}, CorruptFile, r"describes 640,000,000,027,872 parameters, and the files hold 34,080"),
        ({"hidden_size": "abc"}, UnsupportedModel, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, UnsupportedModel, r"config\.json"),
        ({"num_attention_heads": 5}, UnsupportedModel, "not a multiple of the number of attention heads"),
        ({"model_type": "no-such-type"}, UnsupportedModel, r"config\.json: .*`no-such-type`.*does not recognize"),
        ({"model_type": 5}, UnsupportedModel, r"config\.json"),
        ({"dtype": "int9"}, UnsupportedModel, r"config\.json: .*int9"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedModel, "already quantised: start"),
        ({"quantization_config": "x"}, UnsupportedModel, "already quantised: start"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(recipe, model_copy, refused, values, error, words):
    change_config(model_copy, **values)
    refused_everywhere(refused, recipe, model_copy, error, words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "bert"}, '"bert" is not supported: it is neither one of .*llama'),
        ({"model_type": "t5"}, 'cannot build a causal language model from the configuration of type "t5"'),
        ({"hidden_size": -4}, "cannot build a causal language model .*negative dimension"),
        ({"hidden_act": "nope"}, "cannot build a causal language model .*unknown value 'nope'"),
    ],
    ids=str,
)
def test_an_architecture_that_cannot_be_pruned(recipe, model_copy, refused, values, words):
    change_config(model_copy, **values)
    message = refused({**recipe(), "model": str(model_copy)}, UnsupportedModel, words)
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "must hold a JSON object, not a list"),
    ],
)
def test_a_configuration_that_is_none(recipe, model_copy, refused, content, words):
    (model_copy / "config.json").write_bytes(content)
    refused_everywhere(refused, recipe, model_copy, CorruptFile, rf"config\.json {words}")


def test_no_configuration(recipe, model_copy, refused):
    (model_copy / "config.json").unlink()
    refused_everywhere(refused, recipe, model_copy, InvalidInput, "has no config.json: it is not a Hugging Face model")


def test_code_of_a_model_folder_is_never_run(recipe, model_copy, refused, tmp_path, monkeypatch):
    mark = tmp_path / "pwned"
    (model_copy / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    change_config(
        model_copy, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )

    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("may it run?") or "y")
    refused_everywhere(refused, recipe, model_copy, UnsupportedModel, "custom code")
    assert not asked
    assert not mark.exists()


def test_pickled_weights_are_never_read(recipe, model_copy, refused, tmp_path):
    mark = tmp_path / "pwned"

    class Evil:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    (model_copy / WHOLE).unlink()
    torch.save({"a": Evil()}, model_copy / "pytorch_model.bin")
    words = (
        r"has no model\.safetensors .*\(it holds pytorch_model\.bin: only safetensors are read, save the model again"
    )
    refused_everywhere(refused, recipe, model_copy, InvalidInput, words)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj",
        "model.layers.2.input_layernorm",
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(recipe, model_copy, tmp_path, name, value):
    def poke(tensors):
        tensors[f"{name}.weight"].view(-1)[3] = value

    change_weights(model_copy, poke)
    with pytest.raises(NumericalError, match=rf"{name}: 1 of \d+ weights are NaN or infinite; .*fetch or save it"):
        sparity.run(recipe({"score": "magnitude"}, model=str(model_copy)), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_a_narrow_type_cannot_hold(recipe, model_copy, tmp_path):
    change_weights(model_copy, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[3].fill_(1e6))
    given = recipe({"score": "magnitude"}, model=str(model_copy), dtype="float16")
    with pytest.raises(NumericalError, match=r"up_proj: 1 of 2048 weights are too large for torch\.float16; choose"):
        sparity.run(given, output=tmp_path / "out")
    sparity.run({**given, "dtype": "bfloat16"}, output=tmp_path / "out", force=True)


def test_a_file_that_vanishes_in_mid_run(recipe, model_copy, tmp_path, monkeypatch):
    from sparity.pipeline.run.run_folder import RunFolder

    commit = RunFolder.commit

    def steal(self, *arguments):
        commit(self, *arguments)
        (model_copy / WHOLE).unlink(missing_ok=True)

    given = recipe(model=str(model_copy))
    kept = shutil.copytree(model_copy, tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "commit", steal)
        with pytest.raises(CorruptFile, match=rf"{WHOLE} changed or vanished while it was read"):
            sparity.run(given, output=tmp_path / "out")
    assert json.loads((tmp_path / "out.partial/.sparity/progress.json").read_text())["blocks"] == 1
    shutil.copy2(kept / WHOLE, model_copy / WHOLE)
    sparity.run(given, output=tmp_path / "out", resume=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(recipe, stories_model, refused, tmp_path, name):
    folder = shutil.copytree(stories_model, tmp_path / "real")
    (folder / name).chmod(0o600)
    (folder / name).write_text("{")
    refused({**recipe(), "model": str(folder)}, CorruptFile, f"the tokenizer of {folder} cannot be loaded")


def test_types_that_do_not_exist(tiny_llama_folder):
    with pytest.raises(InvalidInput, match="dtype 'float99': use float32, bfloat16, float16 or auto"):
        sparity.load(tiny_llama_folder, dtype="float99")
    with pytest.raises(InvalidInput, match="dtype 'int8'"):
        sparity.load(tiny_llama_folder, dtype="int8")
