"""Whatever lies in a model's folder: Sparity opens the very tensors that transformers would load, or refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparity
from packed_folders import same
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import weight_bytes
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.pipeline.run.packing import convert

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def say(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other(tensors, by=1.0):
    return {name: tensor + by for name, tensor in tensors.items()}


def shards(folder, tensors, stem="model", index=INDEX):
    """Two shards and their index."""
    names = sorted(tensors)
    homes = {name: f"{stem}-0000{1 + (place > 8)}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(homes.values()):
        save_file({name: tensors[name] for name in names if homes[name] == shard}, folder / shard, {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def whole(folder, tensors):
    pass


def sharded(folder, tensors):
    shards(folder, tensors)
    (folder / WHOLE).unlink()


def older_shards_beside(folder, tensors):
    shards(folder, other(tensors))


def a_broken_index_beside(folder, tensors):
    (folder / INDEX).write_text("{")


def a_variant_beside(folder, tensors):
    save_file(other(tensors), folder / "model.fp16.safetensors", {"format": "pt"})
    shards(folder, other(tensors, 2.0), "model.fp16", "model.safetensors.index.fp16.json")


def a_stray_file_beside(folder, tensors):
    save_file(other(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    save_file(other(tensors), folder / "consolidated.safetensors", {"format": "pt"})


def named_by_the_configuration(folder, tensors):
    save_file(other(tensors), folder / "weights.safetensors", {"format": "pt"})
    say(folder, transformers_weights="weights.safetensors")


def an_index_named_by_the_configuration(folder, tensors):
    shards(folder, other(tensors), "new", "new.safetensors.index.json")
    say(folder, transformers_weights="new.safetensors.index.json")


def a_tensor_in_two_shards(folder, tensors):
    sharded(folder, tensors)
    last = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    name = next(iter(first))
    save_file({**load_file(last), name: first[name] + 3}, last, {"format": "pt"})


def linked(folder, tensors):
    """As the hub's cache keeps a model: a snapshot of links to blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / f"{number:040x}")
        path.symlink_to(f"../blobs/{number:040x}")


def linked_shards(folder, tensors):
    sharded(folder, tensors)
    linked(folder, tensors)


def pickled_beside(folder, tensors):
    torch.save(other(tensors), folder / "pytorch_model.bin")


LAYOUTS = (
    whole, sharded, older_shards_beside, a_broken_index_beside, a_variant_beside,
    a_stray_file_beside, named_by_the_configuration, an_index_named_by_the_configuration, a_tensor_in_two_shards,
    linked, linked_shards, pickled_beside,
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_both_loaders_read_the_same_tensors(model_copy, layout):
    layout(model_copy, load_file(model_copy / WHOLE))
    theirs = AutoModelForCausalLM.from_pretrained(model_copy).state_dict()
    source = CheckpointSource(model_copy)
    assert same(source.read(list(source.shapes())), theirs)
    assert same(sparity.load(model_copy).state_dict(), theirs)


def test_a_stray_file_is_not_counted(model_copy):
    before = weight_bytes(model_copy)
    save_file({"x": torch.zeros(1_000_000)}, model_copy / "stray.safetensors")
    assert weight_bytes(model_copy) == before == (model_copy / WHOLE).stat().st_size


def test_what_is_pruned_is_what_transformers_loads(recipe, model_copy, tmp_path):
    """A newer single file beside an older sharded checkpoint, and one that config.json names."""
    tensors = load_file(model_copy / WHOLE)
    older_shards_beside(model_copy, tensors)
    given = recipe({"score": "magnitude", "sparsity": 0.25}, model=str(model_copy))
    done = sparity.run(given, output=tmp_path / "out", device="cpu")
    assert torch.equal(done.model().model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert done.report.candidates[0].bytes_dense == (model_copy / WHOLE).stat().st_size
    named_by_the_configuration(model_copy, tensors)
    done = sparity.run(given, output=tmp_path / "named", device="cpu")
    assert torch.equal(done.model().model.embed_tokens.weight, tensors["model.embed_tokens.weight"] + 1)


def only_a_variant(folder, tensors):
    (folder / WHOLE).rename(folder / "model.fp16.safetensors")


def weights_of_another_folder(folder, tensors):
    shutil.copytree(folder, folder.with_name("other"))
    say(folder, transformers_weights="../other/model.safetensors")


def missing_weights_that_are_named(folder, tensors):
    say(folder, transformers_weights="weights.safetensors")


def pickled_weights_that_are_named(folder, tensors):
    torch.save(tensors, folder / "adapter_model.bin")
    say(folder, transformers_weights="adapter_model.bin")


def an_adapter(folder, tensors):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def a_distributed_checkpoint(folder, tensors):
    save_file(tensors, folder / "shard-00001-model-00001-of-00001.safetensors")


def packed_by_its_word(folder, tensors):
    say(folder, quantization_config={"quant_method": "sparity", "version": 2, "weights": "packed", "runtime": []})


REFUSED = {
    only_a_variant: (InvalidInput, r"model\.fp16\.safetensors: a variant is loaded only by its name"),
    weights_of_another_folder: (InvalidInput, "transformers_weights is .* which is no file of this folder"),
    missing_weights_that_are_named: (InvalidInput, "transformers_weights is .* missing or no safetensors"),
    pickled_weights_that_are_named: (InvalidInput, "transformers_weights is .* missing or no safetensors"),
    an_adapter: (InvalidInput, "transformers adds that adapter to the weights; merge"),
    a_distributed_checkpoint: (InvalidInput, "a distributed checkpoint .* save the model again in one process"),
    packed_by_its_word: (CorruptFile, r"sparity\.safetensors\.index\.json is missing"),
}


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.__name__)
def test_what_would_be_another_model_is_refused(model_copy, tmp_path, layout):
    layout(model_copy, load_file(model_copy / WHOLE))
    error, words = REFUSED[layout]
    for use in (sparity.load, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(SparityError, match=words) as caught:
            use(model_copy)
        assert type(caught.value) is error
    assert not list(tmp_path.glob("out*"))
