"""GGUF files as models: the weights that they store, their tokenizer, the cache, and what is refused."""

import logging
import os
import threading
import time

import pytest
import torch
from gguf import GGMLQuantizationType as Type

import sparity
from gguf_models import SPECIAL, dequantised, tiny_llama, write
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import gguf
from sparity.models.loading import load, load_tokenizer
from sparity.models.transformers import locate

IDS = torch.tensor([[5, 17, 40, 3, 99, 200, 7, 7]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_a_file_gives_the_model_whose_weights_it_stores(kind, tmp_path):
    file = write(tmp_path / "model.gguf", kind=kind)
    model = load(file)
    expected = dequantised(tiny_llama(), kind)
    assert model.dtype == torch.bfloat16
    for (name, found), stored in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found.float(), stored), name
    with torch.no_grad():  # which the order of the rows of q and k decides
        assert torch.equal(model.float()(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    file = write(tmp_path / "model.gguf", tiny_llama(tied=tied))
    model = load(file)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    from safetensors import safe_open

    with safe_open(locate(file) / "model.safetensors", "pt") as stored:
        assert ("lm_head.weight" in stored.keys()) != tied  # noqa: SIM118 - not a mapping


def test_a_run_takes_the_file_as_its_model(tmp_path, token_files):
    file = write(tmp_path / "model.gguf")
    recipe = {
        "model": str(file),
        "stages": [{"prune": {"score": "magnitude", "sparsity": 0.5}}],
        "measure": {"perplexity": [token_files["text"]], "window": 32, "speed": None},
    }
    report = sparity.run(recipe, output=tmp_path / "out").report
    assert report.model == str(file)
    assert report.candidates[0].sparsity == pytest.approx(0.5, abs=0.01)
    assert load_tokenizer(tmp_path / "out").chat_template


# ---- the tokenizer


def test_digits_stand_alone_and_white_space_before_them_stays_whole(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "model.gguf"))
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]  # GPT-2's rule would give Ġ, Ġ, 1, 2
    assert tokenizer.tokenize("hi hi") == ["hi", "Ġ", "hi"]
    other = load_tokenizer(write(tmp_path / "other.gguf", rule="gpt-2"))
    assert other.tokenize("  12") == ["Ġ", "Ġ", "1", "2"]


def test_special_tokens_chat_template_and_any_text_survive(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "model.gguf"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[0])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer(chat)["input_ids"] == [1, WORD("hi"), 2]
    for text in ("In 1984, 3.14 \n\n\t x=10;", "é 日本語 🙂", "  lead and trail  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def WORD(word):  # noqa: N802
    from gguf_models import WORDS

    return WORDS.index(word)


def test_a_way_of_cutting_words_that_nobody_knows_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_tokenizer(write(tmp_path / "model.gguf", rule="mine"))
    assert "how its tokenizer cuts text into words (mine) is not known here" in caplog.text


# ---- the cache


def test_it_is_converted_once_and_again_when_it_changes(tmp_path, cache, caplog):
    file = write(tmp_path / "model.gguf")
    with caplog.at_level(logging.WARNING):
        folder = locate(file)
        assert locate(file) == folder
    said = [record.getMessage() for record in caplog.records if "dequantised" in record.getMessage()]
    assert said == [f"{file} is dequantised to bfloat16, once, in {folder}"]
    assert folder.parent == cache / "gguf"
    os.utime(file, ns=(1, 1))
    assert locate(file) != folder


def test_an_interrupted_conversion_leaves_nothing_and_a_killed_one_is_cleared_away(cache):
    target = cache / "gguf" / "model"

    def stopped(place):
        (place / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.kept(target, stopped)
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == []
    killed = target.with_name(".model.partial")
    killed.mkdir()
    (killed / "half").write_text("half")
    gguf.kept(target, lambda place: (place / "whole").write_text("whole"))
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert not killed.exists()


def test_of_two_at_once_one_makes_it_and_the_other_waits(cache):
    made, found = [], []

    def make(place):
        made.append(place)
        time.sleep(0.2)
        (place / "whole").write_text("whole")

    threads = [
        threading.Thread(target=lambda: found.append(gguf.kept(cache / "gguf" / "model", make))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == [cache / "gguf" / "model"] * 2


# ---- what is refused; damaged headers are in tests/attacks/test_gguf_files.py


def test_scaled_rotary_positions_are_refused_since_the_reader_loses_them(tmp_path):
    import numpy as np

    file = write(
        tmp_path / "model.gguf", more=lambda out: out.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    )
    with pytest.raises(InvalidInput, match=r"scales its rotary positions \(rope_freqs.weight\)"):
        locate(file)


def test_a_model_of_another_size_than_the_file_says_is_refused(tmp_path):
    wrong = tiny_llama()
    wrong.config.intermediate_size = 96
    with pytest.raises(CorruptFile, match=r"holds [\d,]+ weights, and the model that it describes has [\d,]+"):
        locate(write(tmp_path / "model.gguf", wrong))


def test_an_absurd_number_of_blocks_takes_no_memory(tmp_path):
    file = write(tmp_path / "model.gguf")
    before, key, after = file.read_bytes().partition(b"llama.block_count")
    of_type, count, rest = after[:4], after[4:8], after[8:]
    assert int.from_bytes(count, "little") == 2
    file.write_bytes(before + key + of_type + (100_000_000).to_bytes(4, "little") + rest)
    with pytest.raises(CorruptFile, match=r"100000000 blocks in 20 tensors"):
        locate(file)


def test_a_folder_with_nothing_but_a_file_of_that_kind_says_to_name_the_file(tmp_path):
    file = write(tmp_path / "model.gguf")
    with pytest.raises(
        InvalidInput, match=f"it is not a Hugging Face model folder; for the GGUF file in it, give {file} itself"
    ):
        load(tmp_path)


def test_a_file_that_is_no_model_is_told_what_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(
        InvalidInput, match="is neither a folder nor a GGUF file; give a Hugging Face folder, a GGUF file"
    ):
        locate(tmp_path / "notes.txt")
