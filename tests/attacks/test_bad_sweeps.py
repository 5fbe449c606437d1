"""A wrong sweep file: one line that says what, where and what to do, before anything is written."""

import json
import math
import os
import re

import pytest

import sparity
from sparity.errors import CorruptFile, InvalidInput
from sparity.pipeline.studies import sweeping
from sparity.sweep_file import Sweep

SPARSITY = "stages.0.prune.sparsity"
WANDA = {"stages.0.prune.score": "wanda"}


@pytest.fixture
def file(recipe, tmp_path, monkeypatch):
    """A function that writes a sweep file, run from its folder."""
    monkeypatch.chdir(tmp_path)

    def write(content):
        (tmp_path / "sweep.yaml").write_text(content if isinstance(content, str) else json.dumps(content))
        return "sweep.yaml"

    return write


def refused(monkeypatch, file, words, overrides=None, **arguments):
    """The message with which a sweep is refused; nothing is run and nothing is written."""
    monkeypatch.setattr(sweeping, "execute", lambda *_, **__: pytest.fail("work before the check"))
    with pytest.raises(sparity.SparityError, match=words) as caught:
        sweeping.execute_sweep(Sweep.read(file, overrides, **arguments), sweeping.Silence(), output="out", device="cpu")
    assert os.listdir() == ["sweep.yaml"]
    message = str(caught.value)
    assert message.isprintable() or "is not YAML" in message, ascii(message)  # that one shows the place in the file
    return message


VARY = [
    (None, r"^sweep\.yaml, vary: expected axes, each a recipe key with a list of values .*got None"),
    ({}, r"^sweep\.yaml, vary: expected axes"),
    ([1], r"^sweep\.yaml, vary: expected axes.*got \[1\]"),
    ({SPARSITY: []}, rf"^sweep\.yaml, vary\.{SPARSITY}: no values: give at least one, or take the axis out"),
    ({"method": {}}, r"^sweep\.yaml, vary\.method: no values"),
    ({SPARSITY: 0.5}, rf"^sweep\.yaml, vary\.{SPARSITY}: expected a list of values, or a mapping label -> .*got 0\.5"),
    ({SPARSITY: None}, "expected a list of values.*got None"),
    ({SPARSITY: [0.5, 0.3, 0.5]}, rf'vary\.{SPARSITY}: the label "0\.5" stands twice'),
    ({SPARSITY: [0.5, "0.5"]}, 'the label "0.5" stands twice'),
    ({SPARSITY: [math.nan]}, "nan is no finite number"),
    ({SPARSITY: [math.inf]}, "inf is no finite number"),
    ({"method": {"wanda": "wanda"}}, r'vary\.method, label "wanda": expected \{recipe key: value\}, .*got wanda'),
    ({"method": {"plain": None}}, r'label "plain": expected .*or \{\} for the base recipe as it is, got None'),
    ({"method": {"a": {"": 1}}}, r"vary\.method, label \"a\": '' is no recipe key"),
    ({"method": {"": WANDA}}, "a label is one line of visible characters, got ''"),
    ({"method": {" wanda": WANDA}}, "a label is one line of visible characters"),
    ({"method": {"a\nb": WANDA}}, r"visible characters, got 'a\\nb'"),
    ({"method": {"\u001b[31mred": WANDA}}, r"visible characters, got '\\x1b\[31mred'"),
    ({"method": {"\u202egpj": WANDA}}, r"visible characters, got '\\u202egpj'"),
    ({"method": {"x" * 81: WANDA}}, "a label has 81 characters, more than 80: give a short one"),
    ({"a\u0000b": {"x": WANDA}}, r"vary\.'a\\x00b': the axis's name is one line of visible characters"),
    ({"x" * 200: {"x": WANDA}}, "the axis's name has 200 characters"),
    ({"perplexity": {"x": WANDA}}, r"vary\.perplexity: the table has a column of that name: give the axis another one"),
    ({"calibration.text": [["a" * 100]]}, "a label has 102 characters, more than 80: give a short one, as name"),
    ({"stages.0.prune.sparsty": [0.5]}, r'combination "0\.5": stages\.0\.prune\.sparsty: unknown key; did you mean "'),
    ({"stages.1.prune.sparsity": [0.5]}, r'label "0\.5": stages\.1\.prune\.sparsity: "1" is not one of the 1 items'),
    ({"stages..prune": [0.5]}, '"" is not one of the 1 items'),
    ({"model.name": [1]}, r'combination "1": model: Input should be a valid string'),
    ({SPARSITY: ["much"]}, rf'combination "much": {SPARSITY}: .*got \'much\''),
    ({"output.path": ["elsewhere"]}, r"^sweep\.yaml: output\.path: leave it out"),
    ({SPARSITY: [0.1], "stages.0.prune": [{}]}, f"vary.{SPARSITY} and vary.stages.0.prune both set .*leave it to one"),
    ({"a": {"x": WANDA}, "b": {"y": WANDA}}, r"vary\.a and vary\.b both set stages\.0\.prune\.score: leave it to"),
    ({"measure.windows": list(range(1, 1002))}, "1,001 combinations are more than 1,000"),
    ({"a": {str(n): {} for n in range(40)}, "b": {str(n): {} for n in range(40)}}, "40 x 40 = 1,600 combinations"),
    # known only when the combination is prepared
    ({"stages.0.prune.score": ["wanda", "wnda"]}, r'^combination "wnda": no score "wnda"; did you mean "wanda"'),
    ({"stages.0.prune.pattern": ["2:4", "3:5"]}, r'^combination "3:5": model\.layers.*5 does not divide'),
    ({"measure.perplexity": {"a": {"measure.perplexity": ["n.npy"]}}}, r'^combination "a": token file n\.npy does'),
    ({"model": ["no/such/model/at/all"]}, r'^combination "no/such/model/at/all": model .*this path does not exist'),
    ({"measure.window": [32, 4096]}, r'^combination "4096": 4096 tokens per window are more than the model'),
]  # fmt: skip


@pytest.mark.parametrize(("vary", "words"), VARY, ids=lambda value: str(value)[:40])
def test_wrong_axes(recipe, file, monkeypatch, vary, words):
    base = recipe(measure={"perplexity": [], "speed": None})
    if isinstance(vary, dict) and "measure.window" in vary:
        base["measure"]["perplexity"] = [base["calibration"]["tokens"].replace("calibration", "text")]
    # JSON writes NaN and Infinity, YAML reads .nan and .inf
    refused(
        monkeypatch,
        file(re.sub("NaN|Infinity", lambda m: f".{m[0][:3].lower()}", json.dumps({"base": base, "vary": vary}))),
        words,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"bas": {}, "vary": {}}, r'^sweep\.yaml: bas: unknown key; did you mean "base"\? \(keys here: base, vary\)'),
        ({"stages": [], "vary": {}}, r"^sweep\.yaml: stages: unknown key; a recipe's keys go under `base`"),
        ({"vary": {"a": {"x": {}}}}, r"^sweep\.yaml: the key `base` is missing: a recipe, or the path of one"),
        ({"base": {}}, r"^sweep\.yaml: the key `vary` is missing: the axes: a dotted recipe key"),
        ({"base": {"stages": []}, "vary": {"a": {"x": {}}}}, r"^sweep\.yaml, base: stages: .*at least 1"),
        ({"base": {"stage": 1}, "vary": {"a": {"x": {}}}}, r'^sweep\.yaml, base: .*stage: unknown key; did you mean "'),
        ({"base": "none.yaml", "vary": {"a": {"x": {}}}}, r"^recipe none\.yaml does not exist"),
        ({"base": "sweep.yaml", "vary": {"a": {"x": {}}}}, r"^sweep\.yaml: .*base: unknown key"),
        ({"base": 5, "vary": {"a": {"x": {}}}}, "^a recipe is a YAML file, a mapping or a Recipe, not int"),
        ("- base", r"^sweep\.yaml: a sweep is a mapping of keys, got list"),
        ("vary: {a: {x: {}, x: {}}}", 'the key "x" stands twice'),
        ("base: {}\nbase: {}\n", 'the key "base" stands twice'),
        ("base: [", r"^sweep\.yaml is not YAML"),
        ("vary: !!python/object/apply:os.system ['touch pwned']", r"^sweep\.yaml is not YAML"),
        ("[" * 100_000, r"^sweep\.yaml is not YAML"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_files(file, monkeypatch, content, words):
    path = file(content)
    monkeypatch.setattr(sweeping, "execute", lambda *_, **__: pytest.fail("work before the check"))
    with pytest.raises((InvalidInput, CorruptFile), match=rf"(?s){words}"):
        sparity.sweep(path, output="out")
    assert os.listdir() == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "vary.stages.0.prune.sparsty=[0.1]",
            r'no axis "stages\.0\.prune\.sparsty"; did you mean "stages\.0\.prune\.spar',
        ),
        (f"vary.{SPARSITY}=0.1", "expected a list of values"),
        (f"vary.{SPARSITY}=[0.1", "the value is not YAML"),
        (f"{SPARSITY}=0.1", rf"{SPARSITY}=\.\.\. would be lost, vary\.{SPARSITY} sets it: change the axis with 'vary"),
        ("stages.0.prune={}", r"stages\.0\.prune=\.\.\. would be lost"),
        ("measure.windos=1", r'sweep\.yaml, base: measure\.windos: unknown key; did you mean "windows"'),
        ("measure.windows", "write it as key.key=value"),
    ],
)
def test_wrong_overrides(recipe, file, monkeypatch, override, words):
    refused(monkeypatch, file({"base": recipe(), "vary": {SPARSITY: [0.5]}}), words, [override])


def test_a_model_that_an_axis_sets_as_well(recipe, file, monkeypatch):
    path = file({"base": recipe(), "vary": {"model": ["a/b"]}})
    refused(monkeypatch, path, r"--model would be lost, vary\.model sets it", model="c/d")


def test_things_that_are_no_sweep():
    for thing in (None, 5, ["sweep.yaml"]):
        with pytest.raises(InvalidInput, match="a sweep is a YAML file or a mapping, not"):
            sparity.sweep(thing)
    with pytest.raises(InvalidInput, match=r"sweep none\.yaml does not exist"):
        sparity.sweep("none.yaml")
    with pytest.raises(InvalidInput, match="a value of type object cannot be written in YAML"):
        sparity.sweep({"base": {"stages": [{"prune": {}}]}, "vary": {"model": [object()]}})
    with pytest.raises(InvalidInput, match=r"^sweep, vary\.5: the axis's name is text, got 5"):
        sparity.sweep({"base": {"stages": [{"prune": {}}]}, "vary": {5: [1]}})
    round_and_round = []
    round_and_round.append(round_and_round)
    with pytest.raises(InvalidInput, match=r'^sweep, combination ".*": model: Input should be a valid string'):
        sparity.sweep({"base": {"stages": [{"prune": {}}]}, "vary": {"model": [round_and_round]}})
