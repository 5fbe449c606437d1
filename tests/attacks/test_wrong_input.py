"""What is wrong with an input is said by Sparity's own errors, from the command line and from Python."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparity
from families import build, tiny_configs
from sparity.cli.main import app
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.files import read_json_object, write_json
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.result_folder import named_folder
from sparity.pipeline.run.verify import verify

PLACES = [
    ("/", "is the root of the file system"),
    ("//", "is the root of the file system"),
    ("/..", "is the root of the file system"),
    ("a\0b", "no name of a folder holds a NUL"),
    ("\udc80", "only to names in UTF-8"),
    ("x/\ud800/y", "only to names in UTF-8"),
    ("", "the name of the output is empty"),
]


@pytest.mark.parametrize(("place", "words"), PLACES)
def test_outputs_that_no_folder_can_be(recipe, tiny_llama_folder, place, words):
    with pytest.raises(InvalidInput, match=words):
        named_folder(place)
    with pytest.raises(InvalidInput, match=words):
        sparity.run(recipe(), output=place)
    with pytest.raises(InvalidInput, match=words):
        sparity.run({**recipe(), "output": {"path": place}})
    with pytest.raises(InvalidInput, match=words):
        convert(tiny_llama_folder, place)


@pytest.mark.parametrize("place", ["/", "a\0b", "\udc80"])
@pytest.mark.parametrize(
    "verb", [["bench", "zoo:llama"], ["demo"], ["sensitivity", "zoo:llama"], ["prune", "zoo:llama"]], ids=lambda v: v[0]
)
def test_every_verb_that_writes_refuses_them(verb, place):
    result = CliRunner().invoke(app, [*verb, "-o", place, *(["--force"] if verb[0] == "bench" else [])])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "error: output" in result.stderr


@pytest.mark.parametrize("text", ["\ud800", "words \udfff words", "\ud83d alone"])
def test_texts_with_half_a_surrogate_pair(recipe, refused, stories_model, text):
    words = "the given list, row 1: no valid text, half a surrogate pair"
    calibration = {"text": ["fine", text], "samples": 1, "length": 8}
    refused({**recipe(), "model": str(stories_model), "calibration": calibration}, InvalidInput, words)
    measured = {"perplexity": [{"text": ["fine", text]}], "speed": None}
    stages = [{"prune": {"score": "magnitude"}}]
    refused({"model": str(stories_model), "stages": stages, "measure": measured}, InvalidInput, words)


def test_a_name_with_half_a_surrogate_pair_is_written_as_json_writes_it(recipe, token_files, tmp_path):
    measure = {"perplexity": [{"tokens": token_files["text"], "name": "a\udc80"}], "window": 32, "speed": None}
    sparity.run(recipe(measure=measure), output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "sparity.json").read_text(encoding="utf-8"))
    assert record["report"]["candidates"][0]["quality"][0]["text"] == "a\udc80"
    assert r"a\udc80" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_json_with_half_a_surrogate_pair_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"a\ud800": "\udfff\U0001f600"})
    assert read_json_object(tmp_path / "a.json") == {"a\ud800": "\udfff\U0001f600"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["rms_norm_eps", "initializer_range", "anything"])
def test_a_configuration_with_a_number_that_is_none(model_copy, tmp_path, number, key):
    config = json.loads((model_copy / "config.json").read_text())
    text = json.dumps({**config, key: "HERE"}).replace('"HERE"', number)
    (model_copy / "config.json").write_text(text)
    for use in (sparity.load, lambda folder: convert(folder, tmp_path / "packed")):
        with pytest.raises(CorruptFile, match=r"config\.json is not JSON \(.* is no number that JSON has\)"):
            use(model_copy)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("stages", 0, "options", "sparsity"), "NaN"),
        (("stages", 0, "options", "sparsity"), "1e400"),
        (("stages", 0, "decision"), "[NaN]"),
        (("stages", 0, "decision"), '{"x": Infinity}'),
        (("stages", 0, "options"), "[1]"),
        (("stages", 0), "7"),
        (("projections",), '{"a": {"zeros": NaN, "shape": [1, 1]}}'),
    ],
)
def test_a_record_with_numbers_that_are_none(recipe, tmp_path, place, value):
    sparity.run(recipe(), output=tmp_path / "out")
    path = tmp_path / "out" / "sparity.json"
    record = json.loads(path.read_text())
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "HERE"
    path.write_text(json.dumps(record).replace('"HERE"', value))
    with pytest.raises(CorruptFile, match=r"sparity\.json"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("change", [{"return_dict": False}, {"torchscript": True}, {"output_attentions": True}])
def test_the_form_of_outputs_is_no_property_of_a_model(recipe, model_copy, token_files, tmp_path, change):
    ids = np.load(token_files["text"])
    expected = sparity.perplexity(sparity.load(model_copy), ids, 32)
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, **change}))
    model = sparity.load(model_copy)
    assert sparity.perplexity(model, ids, 32) == expected
    assert model.generate(torch.tensor([[5]]), max_new_tokens=2, do_sample=False).shape == (1, 3)
    speed = {"prompt": 4, "tokens": 2, "rounds": 1}
    measure = {"perplexity": [token_files["text"]], "window": 32, "speed": speed}
    result = sparity.run(recipe(model=str(model_copy), measure=measure), output=tmp_path / "out")
    assert result.report.candidates[0].quality[0].dense_perplexity == pytest.approx(expected, rel=1e-5)


def test_a_model_in_memory_keeps_its_own_form_of_outputs(token_files):
    model = build(tiny_configs()["llama"])
    ids = np.load(token_files["text"])
    expected = sparity.perplexity(model, ids, 32)
    model.config.return_dict = False
    assert sparity.perplexity(model, ids, 32) == expected
    assert model.config.return_dict is False


def test_more_sequences_at_once_than_tokens(recipe, tmp_path):
    speed = {"prompt": 30, "tokens": 2, "rounds": 1, "batch": [50]}
    result = sparity.run(recipe(measure={"speed": speed}), output=tmp_path / "out")
    assert result.report.candidates[0].speed.batch == 50


@pytest.mark.parametrize("verb", ["eval", "verify", "plan", "run", "generate", "bench", "doctor", "sweep", "explain"])
@pytest.mark.parametrize("word", ["a\0b", "\udc80", "x" * 5000, "/dev/null", "/proc/self/mem", "~", "."])
def test_names_that_are_none_in_every_verb(verb, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"generate": ["hello"], "sweep": ["-o", "out"], "run": ["-o", "out"]}
    given = ["--kernels", word] if verb == "doctor" else [word]
    result = CliRunner().invoke(app, [verb, *given, *more.get(verb, [])])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == (2 if "Usage: " in result.stderr else 1)  # typer looks at paths itself
    assert "rror" in result.stderr


def test_the_boundary_of_python(monkeypatch, recipe):
    def fails(*_, **__):
        raise OSError(5, "Input/output error", "weights")

    monkeypatch.setattr("sparity.pipeline.run.runner.execute", fails)
    with pytest.raises(SparityError, match=r"the input cannot be used .*Input/output error"):
        sparity.run(recipe())
