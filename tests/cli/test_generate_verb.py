"""`sparity generate`: what it prints where, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from sparity import run, zoo
from sparity.cli.main import app
from sparity.cli.text_stream import TextStream
from sparity.engine.attach import attach
from sparity.engine.kernels import native
from sparity.engine.modules.skips import tokens_of
from sparity.models.loading import load, load_tokenizer

PROMPT = "The following"


@pytest.fixture(scope="module")
def expected():
    """What transformers says by itself: the text of 12 tokens after the prompt."""
    model, tokenizer = load("zoo:llama"), load_tokenizer("zoo:llama")
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_greedy_text_is_that_of_transformers(sparity, expected):
    done = sparity("generate", "zoo:llama", PROMPT, "--tokens", 12)
    assert (done.code, done.out, done.err) == (0, f"{expected}\n", "")


def test_prompt_from_standard_input(expected):
    done = CliRunner().invoke(app, ["generate", "zoo:llama", "-", "--tokens", "12"], input=PROMPT)
    assert done.stdout == f"{expected}\n"


def test_json_and_stats(sparity, expected):
    done = sparity("generate", "zoo:llama", PROMPT, "--tokens", 12, "--json")
    keys = ["model", "prompt", "text", "ids", "prompt_tokens", "tokens", "first_token", "tokens_per_second"]
    assert list(done.json) == keys
    assert done.json["text"] == expected
    assert done.json["tokens"] == len(done.json["ids"]) == 12
    assert done.json["tokens_per_second"] > 0
    one = sparity("generate", "zoo:llama", PROMPT, "--tokens", 1, "--json").json
    assert one["tokens_per_second"] is None
    stats = sparity("generate", "zoo:llama", PROMPT, "--tokens", 12, "--stats")
    assert stats.out == f"{expected}\n"
    assert stats.err.startswith(f"{one['prompt_tokens']} tokens of prompt, 12 new ones; first token after ")


def test_stats_say_why_calls_left_the_fast_path(sparity, tmp_path):
    long = sparity("generate", "zoo:llama", "the cat sat on the mat and " * 12, "--tokens", 3, "--stats")
    prompt = int(long.err.split()[0])
    assert long.err.splitlines()[1:] == (
        [f"left the fast path 1 x: 1 x {prompt} new tokens; the fast path takes 1 to 32"]
        if native.unavailable() is None
        else [f"left the fast path 3 x: no compiled kernels: {native.unavailable()}"]
    )


def test_a_draw_is_repeated_by_its_seed(sparity, expected):
    def draw(*options):
        return sparity("generate", "zoo:llama", PROMPT, "--tokens", 12, "--temperature", 5, *options).out

    assert draw("--seed", 1) == draw("--seed", 1) != draw("--seed", 2)
    assert draw("--top-p", 0) == f"{expected}\n"  # only the likeliest token is left


def test_beams_that_the_models_own_file_asks_for_are_not_searched(sparity, tmp_path, expected):
    folder = shutil.copytree(zoo.path("llama"), tmp_path / "beams")
    (folder / "generation_config.json").write_text('{"num_beams": 4, "num_return_sequences": 2}')
    assert sparity("generate", folder, PROMPT, "--tokens", 12).out == f"{expected}\n"


@pytest.mark.parametrize("asked", ['{"prompt_lookup_num_tokens": 5}', '{"num_beams": 1000000}'])
def test_what_the_models_own_file_asks_for_is_obeyed_or_cannot_be_streamed(sparity, tmp_path, expected, asked):
    """Drafts from the prompt give the text of greedy decoding; beams are not searched."""
    folder = shutil.copytree(zoo.path("llama"), tmp_path / "asks")
    (folder / "generation_config.json").write_text(asked)
    assert sparity("generate", folder, PROMPT, "--tokens", 12).out == f"{expected}\n"


@pytest.mark.parametrize(
    "asked",
    [
        '{"prompt_lookup_num_tokens": -3}',
        '{"repetition_penalty": -1.0}',
        '{"cache_implementation": "none such"}',
        '{"num_return_sequences": 1000000}',
        '{"compile_config": 5}',
    ],
)
def test_what_it_asks_for_and_transformers_refuses_is_said_with_its_name(sparity, tmp_path, asked):
    folder = shutil.copytree(zoo.path("llama"), tmp_path / "asks")
    (folder / "generation_config.json").write_text(asked)
    done = sparity("generate", folder, PROMPT, "--tokens", 12)
    assert done.code == 1
    assert "generation_config.json" in done.err or "cannot load" in done.err
    assert done.err.count("\n") == 1


def test_a_chat_template_is_used(sparity, tmp_path):
    plain = sparity("generate", "zoo:llama", PROMPT, "--chat")
    assert plain.code == 1
    assert plain.err.startswith("error: zoo:llama has no chat template")
    folder = shutil.copytree(load_tokenizer("zoo:llama").name_or_path, tmp_path / "chat")
    template = (
        "{% for m in messages %}The following {{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    chat = sparity("generate", folder, "example", "--chat", "--tokens", 5)
    assert chat.code == 0
    assert chat.out == sparity("generate", folder, "The following example:", "--tokens", 5).out


def test_what_is_refused(sparity, model):
    def refusal(*arguments):
        done = sparity("generate", *arguments)
        assert done.code == 1
        return done.err.strip()

    assert refusal("zoo:llama", "") == "error: the prompt is empty: give at least one token to go on from"
    assert refusal("zoo:llama", "a", "--tokens", 3000).startswith(
        "error: the prompt of 1 tokens and 3000 new ones do not fit the model's context of 2048"
    )
    assert refusal(model, "a") == f"error: {model} has no tokenizer: generate needs the folder with its tokenizer.json"
    assert refusal("no/such/model", "a").startswith("error: model no/such/model: this path does not exist")
    assert refusal("zoo:llama", "\udcff").startswith("error: the prompt is not text in UTF-8")
    assert refusal("zoo:llama", "a", "--temperature", 1e-45).startswith("error: --temperature 1e-45: at least 0.001")


@pytest.mark.parametrize(
    "option", [("--seed", 2**64), ("--seed", -1), ("--threads", 100_000), ("--temperature", "inf"), ("--tokens", 0)]
)
def test_numbers_out_of_range(sparity, option):
    done = sparity("generate", "zoo:llama", PROMPT, *option)
    assert done.code == 2
    assert f"Invalid value for '{option[0]}'" in " ".join(done.err.split())


def test_bytes_that_are_no_text(sparity):
    done = CliRunner().invoke(app, ["generate", "zoo:llama", "-"], input=b"\xff\xfe\x00")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: the prompt is not text in UTF-8")


def test_half_of_a_character_is_held_back_until_it_is_whole():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return bytes(ids).decode(errors="replace")

    pieces = []
    stream = TextStream(Bytes(), pieces.append)
    stream.put(torch.tensor([[65, 66]]))  # the prompt
    for byte in "xä→".encode()[:-1]:
        stream.put(torch.tensor([byte]))
    stream.end()
    assert pieces == ["x", "ä", "\ufffd"]
    assert stream.text == "xä\ufffd"
    assert json.loads(json.dumps(stream.ids)) == list("xä→".encode()[:-1])


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """A folder of zoo:llama that skips 40 % of its activations."""
    recipe = {
        "model": "zoo:llama",
        "calibration": {"text": "python-docs:calibration", "documents": "joined", "samples": 4, "length": 128},
        "stages": [{"activations": {"method": "teal", "sparsity": 0.4}}],
        "measure": {"speed": None},
    }
    return run(recipe, output=tmp_path_factory.mktemp("skipping") / "out").path


@pytest.mark.skipif(native.unavailable() is not None, reason="exact mode decodes on the fast path")
def test_exact_mode_prints_the_dense_text_and_says_what_drafting_came_to(sparity, skipping):
    model = attach(load(skipping, dtype="bfloat16"))
    ids = torch.tensor([load_tokenizer("zoo:llama")(PROMPT)["input_ids"]])
    with torch.no_grad(), tokens_of(model).dense():
        made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    done = sparity("generate", skipping, PROMPT, "--tokens", 12, "--exact", "--json").json
    assert done["ids"] == made
    assert list(done["exact"]) == ["drafted", "accepted", "checks", "acceptance"]
    assert done["exact"]["checks"] + done["exact"]["accepted"] == 11
    one = sparity("generate", skipping, PROMPT, "--tokens", 12, "--exact", "--draft", 1, "--stats")
    assert one.out == f"{done['text']}\n"
    counts = re.search(r"^(\d+) tokens drafted, (\d+) of them right \([\d.]+ %\), (\d+) dense checks$", one.err, re.M)
    assert int(counts[1]) <= int(counts[3])
    assert int(counts[2]) + int(counts[3]) == 11
    sparse = sparity("generate", skipping, PROMPT, "--tokens", 12, "--json").json
    assert "exact" not in sparse


def test_exact_mode_is_refused_where_it_cannot_be(sparity, skipping):
    for arguments, words in (
        (("zoo:llama", PROMPT, "--exact"), "this model skips none"),
        ((skipping, PROMPT, "--exact", "--temperature", 1), "--exact gives the likeliest tokens"),
    ):
        done = sparity("generate", *arguments)
        assert done.code == 1
        assert words in done.err
        assert done.err.count("\n") == 1
    assert sparity("generate", skipping, PROMPT, "--exact", "--draft", 32).code == 2
