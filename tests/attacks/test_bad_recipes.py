"""A wrong recipe: one message that says what, where and what to do, before anything is written."""

import numpy as np
import pytest
import torch

import sparity
from sparity import registry
from sparity.errors import CorruptFile, InvalidInput, NumericalError
from sparity.recipe import Recipe
from sparity.static.prune.patterns.base import build_pattern

PRUNE = [
    ({"score": "wnda"}, 'no score "wnda"; did you mean "wanda"\\? `sparity methods score`'),
    ({"score": "zzz"}, 'no score "zzz"; `sparity methods score` lists them all'),
    ({"score": ""}, 'no score ""'),
    ({"score": {}}, "score: give a name or"),
    ({"score": {"wanda": {"a": 0.3}}}, r'score "wanda" has no option "a" \(options: none\)'),
    ({"score": {"obs": {"dampng": 1}}}, 'has no option "dampng"; did you mean "damping"'),
    ({"score": {"obs": {"damping": True}}}, 'score "obs", option "damping": expected float, got True'),
    ({"score": {"obs": {"damping": float("nan")}}}, r"damping nan: it must lie in \[0, 1\]"),
    ({"solver": "sparsgpt"}, 'no solver "sparsgpt"; did you mean "sparsegpt"'),
    ({"solver": {"sparsegpt": 5}}, "solver: give a name or"),
    ({"solver": {"sparsegpt": {"block_columns": 0}}}, "block_columns 0: it must be at least 1"),
    ({"budget": "unifrm"}, 'no budget "unifrm"; did you mean "uniform"'),
    ({"budget": "unifrm", "pattern": "2:4"}, 'no budget "unifrm"; did you mean "uniform"'),
    ({"pattern": "unstructred"}, 'no pattern "unstructred"; did you mean "unstructured".*N:M with N kept of M'),
    ({"pattern": "n_of_m"}, 'pattern "n_of_m" needs the option n and m: `sparity explain n_of_m`'),
    ({"pattern": {"2:4": {"tial": "dense"}}}, 'has no option "tial"; did you mean "tail"'),
    ({"pattern": {"2:4": {"n": 3}}}, "pattern 2:4: the name already says n"),
    ({"pattern": {"2:4": 5}}, "pattern: give a name or"),
    ({"pattern": "5:4"}, "pattern 5:4: N weights are kept of M, so 1 <= N <= M"),
    ({"pattern": "0:4"}, "pattern 0:4"),
    ({"pattern": f"{'9' * 5000}:4"}, "no pattern"),
    ({"pattern": "3:5"}, r"model\.layers\.0\.self_attn\.q_proj: 5 does not divide its 32 input.*tail: dense"),
    ({"pattern": "block:5x5"}, r"model\.layers\.0\.self_attn\.q_proj: blocks of 5x5 do not divide its shape 32x32"),
    ({"pattern": "block:0x4"}, "a block has at least one row and one column"),
    ({"sparsity": 1.0}, r"sparsity 1\.0: .* must lie in \[0, 1\)"),
    ({"sparsity": -0.1}, r"sparsity -0\.1: .* must lie in \[0, 1\)"),
    ({"sparsity": float("nan")}, r"sparsity nan: .* must lie in \[0, 1\)"),
    ({"sparsity": "abc"}, r"stages\.0\.prune\.sparsity: .*number.*got 'abc'"),
    ({"sparsity": True}, r"stages\.0\.prune\.sparsity: expected a number, got True"),
    ({"sparsity": False}, r"stages\.0\.prune\.sparsity: expected a number, got False"),
    ({"sparsity": 0.6, "pattern": "2:4"}, r"sparsity 0\.6 contradicts the pattern: 2 of 4 kept is 0\.5"),
    ({"overrides": {"*.q_prj": 0.3}}, r'override "\*\.q_prj" matches no projection \(one of them is model\.layers\.0'),
    ({"overrides": {"*.q_prj": 0.5}, "pattern": "2:4"}, r'override "\*\.q_prj" matches no projection'),
    ({"overrides": {"*": 1.0}}, r"override \*: sparsity 1\.0 must lie in \[0, 1\)"),
    ({"overrides": {"*": True}}, r"overrides\.\*: expected a number, got True"),
    ({"overrides": {"*.q_proj": 0.3}, "pattern": "2:4"}, "2 of 4 kept removes 50% everywhere and cannot follow"),
    ({"overrides": {"*layers.[01]*": 0.0}, "sparsity": 0.5}, r"would need a sparsity of 1\.500"),
    ({"dense": ["*"]}, "fix every projection"),
    ({"dense": ["*"], "pattern": "2:4"}, "nothing is left to prune"),
    ({"compare_within": "rows"}, "compare_within: Input should be 'row', 'layer' or 'global', got 'rows'"),
    ({"order": "independent", "true_sequential": True}, "true_sequential needs `order: sequential`"),
    ({"scor": "wanda"}, r'stages\.0\.prune\.scor: unknown key; did you mean "score"\? \(keys here: score, pattern'),
]


@pytest.mark.parametrize(("prune", "words"), PRUNE, ids=lambda value: str(value)[:40])
def test_wrong_prune_stage(recipe, refused, prune, words):
    refused(recipe(prune), InvalidInput, words)


SECTIONS = [
    ({"calibraton": {}}, 'calibraton: unknown key; did you mean "calibration"'),
    ({"calibration": {"token": "x.npy"}}, r'calibration\.token: unknown key; did you mean "tokens"'),
    ({"calibration": {}}, "calibration: give either `text` or `tokens`"),
    ({"calibration": {"text": "a.txt", "tokens": "a.npy"}}, "calibration: give either `text` or `tokens`"),
    ({"calibration": {"tokens": "a.npy", "samples": 0}}, r"calibration\.samples: .*greater than or equal to 1, got 0"),
    ({"calibration": {"tokens": "a.npy", "samples": True}}, r"calibration\.samples: expected a number, got True"),
    ({"calibration": None}, "needs calibration text for column_norm: add `calibration: {text: FILE}`"),
    ({"stages": []}, "stages: .*at least 1"),
    ({"stages": [{"mend": {}}]}, r'stages\.0: no stage "mend" \(stages: '),
    ({"stages": "prune"}, "stages: Input should be a valid list"),
    ({"measure": {"perplexity": [{"txt": "a"}]}}, r'measure\.perplexity\.0\.txt: unknown key; did you mean "text"'),
    ({"measure": {"speed": {"promt": 4}}}, r'measure\.speed\.promt: unknown key; did you mean "prompt"'),
    (
        {"measure": {"speed": {}}},
        r"measure\.speed: a prompt of 64 and 32 new tokens do not fit the model's context of 64",
    ),
    ({"accept": {"kl": float("inf")}}, r"accept\.kl: .*finite"),
    ({"accept": {"perplexity": "5"}}, r'accept\.perplexity: write it as "\+5%", got \'5\''),
    ({"accept": {"decode": "fast"}}, r'accept\.decode: write it as "1\.3x", got \'fast\''),
    ({"output": {"format": "zip"}}, r"output\.format: Input should be 'plain' or 'packed', got 'zip'"),
    ({"dtype": "int8"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"),
    ({"model": None}, "names no model"),
    ({"model": " "}, "the name of the model is empty"),
    ({"model": "no/such/folder"}, "model no/such/folder: this path does not exist; give a Hugging Face folder"),
    ({"model": "x" * 5000}, "this path does not exist"),
    ({"model": "~no-such-user/model"}, "model ~no-such-user/model: no such folder here"),
    ({"calibration": {"tokens": "~no-such-user/a.npy"}}, "token file ~no-such-user/a.npy does not exist"),
    ({"model": "zoo:lama"}, 'no model "lama" in the zoo; did you mean "llama"'),
]


@pytest.mark.parametrize(("sections", "words"), SECTIONS, ids=lambda value: str(value)[:40])
def test_wrong_sections(recipe, refused, sections, words):
    refused({**recipe(), **sections}, InvalidInput, words)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu", ""])
def test_a_device_that_cannot_be_used(recipe, tmp_path, device):
    with pytest.raises(InvalidInput, match=f"device '{device}' cannot be used"):
        sparity.run(recipe(), output=tmp_path / "out", device=device)
    assert list(tmp_path.iterdir()) == []


def test_a_message_names_no_alternative_of_a_union(recipe, refused):
    message = refused({**recipe(), "measure": {"perplexity": [{"txt": "a"}]}}, InvalidInput)
    assert "function-" not in message
    assert "valid string" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"stages: [", "is not YAML: .*line 1"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"model: !!python/object/apply:os.system ['touch pwned']", "is not YAML: .*could not determine a constructor"),
        (b"model: !!timestamp 2024-13-45", "is not YAML"),
        (b"[" * 100_000, "is not YAML"),
    ],
)
def test_recipe_files_that_are_not_yaml(tmp_path, content, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"(?s)recipe\.yaml {words}"):
        sparity.run(path, output="out")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("content", "words"),
    [("- prune", "a recipe is a mapping of keys, got list"), ("", "a mapping of keys, got NoneType")],
)
def test_recipe_files_of_another_shape(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=words):
        Recipe.read(path)
    with pytest.raises(InvalidInput, match=r"recipe .*none\.yaml does not exist"):
        Recipe.read(tmp_path / "none.yaml")
    with pytest.raises(InvalidInput, match="does not exist"):
        Recipe.read("x" * 5000)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2:4", "2:4"),  # in YAML 1.1 the number 124
        ("1e-1", 0.1),  # in YAML 1.1 a text
        ("1:30:00", "1:30:00"),
        ("2024-13-45", "2024-13-45"),  # in YAML 1.1 a date, and a crash
        ("010", "010"),
        ("-3", -3),
        (".5", 0.5),
        ("1.5e3", 1500.0),
        (".inf", float("inf")),
        ("true", True),
    ],
)
def test_what_a_plain_word_of_yaml_means(recipe, written, value):
    read = Recipe.read(recipe(), [f"stages.0.prune.score.any={written}"])
    found = read.stages[0].score["any"]
    assert (found, type(found)) == (value, type(value))


def test_overrides_change_a_copy(recipe):
    given = recipe({"sparsity": 0.5})
    read = Recipe.read(given, ["stages.0.prune.sparsity=1e-1", "stages.0.prune.pattern=block:8x8", "measure.window=32"])
    assert read.stages[0].sparsity == 0.1
    assert read.measure.window == 32
    assert given == recipe({"sparsity": 0.5})
    two_of_four = Recipe.read(recipe(), ["stages.0.prune.pattern=2:4"])
    assert two_of_four.stages[0].pattern == "2:4"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.prune.sparsity", "write it as key.key=value"),
        ("=1", "write it as key.key=value"),
        ("stages.7.prune.sparsity=0.1", '"7" is not one of the 1 items'),
        ("stages.x.prune.sparsity=0.1", '"x" is not one of the 1 items'),
        ("stages.\u00b2.prune=1", "is not one of the 1 items"),
        ("stages.0.prune.sparsty=0.1", r'stages\.0\.prune\.sparsty: unknown key; did you mean "sparsity"'),
        ("calibration.length=[1", "the value is not YAML"),
        ("calibration.length=abc", r"calibration\.length: .*got 'abc'"),
    ],
)
def test_wrong_overrides(recipe, override, words):
    with pytest.raises(InvalidInput, match=words):
        Recipe.read(recipe(), [override])


def test_arguments_of_another_kind(recipe):
    with pytest.raises(InvalidInput, match="a recipe is a YAML file, a mapping or a Recipe, not NoneType"):
        sparity.run(None)
    with pytest.raises(InvalidInput, match="a model is a folder, a name or a torch module, not int"):
        sparity.run(recipe(), model=5)


def test_unknown_plug_in_kinds():
    with pytest.raises(InvalidInput, match='no plug-in kind "scores"; did you mean "score"'):
        registry.names("scores")


MATRIX = torch.arange(32.0).reshape(4, 8) + 1
INPUTS = torch.ones(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight": [[1.0]]}, InvalidInput, r"weight must be a floating-point matrix \[out, in\], got list"),
        ({"weight": MATRIX.int()}, InvalidInput, r"got \[4, 8\]"),
        ({"weight": MATRIX[:0]}, InvalidInput, r"got \[0, 8\]"),
        ({"inputs": None}, InvalidInput, "needs the statistics column_norm: pass `inputs`"),
        ({"inputs": INPUTS.numpy()}, InvalidInput, "inputs must be a torch tensor, got ndarray"),
        ({"inputs": INPUTS[:, :7]}, InvalidInput, r"inputs must be \[tokens, 8\] or .*got \[3, 7\]"),
        ({"inputs": INPUTS[:0]}, NumericalError, "weight: no calibration token reached it"),
        ({"inputs": INPUTS * 1e30}, NumericalError, "weight: the inputs hold NaN or infinite numbers"),
        ({"inputs": INPUTS * float("nan")}, NumericalError, "inputs holds NaN"),
        ({"weight": MATRIX / 0}, NumericalError, "weight holds NaN or infinite"),
        ({"gradients": INPUTS}, InvalidInput, r"gradients must be \[4, 8\] or \[samples, 4, 8\], got \[3, 8\]"),
        ({"score": "wnda"}, InvalidInput, 'no score "wnda"; did you mean "wanda"'),
        ({"score": ""}, InvalidInput, 'no score ""'),
        ({"solver": "sparsegp"}, InvalidInput, 'did you mean "sparsegpt"'),
        ({"pattern": None}, InvalidInput, "pattern: give its name"),
        ({"pattern": {"2:4": {}}}, InvalidInput, "pattern: give its name"),
        ({"pattern": "2:5"}, InvalidInput, "weight: 5 does not divide its 8 input columns"),
        ({"pattern": "2:4", "n": 3}, InvalidInput, "the name already says n"),
        ({"dampng": 0.1, "solver": "sparsegpt"}, InvalidInput, 'no option "dampng".*did you mean "damping"'),
        ({"compare_within": "rows"}, InvalidInput, 'did you mean "row"\\? \\(use row or layer or global\\)'),
        ({"sparsity": 1}, InvalidInput, "sparsity 1: it is the share"),
        ({"sparsity": True}, InvalidInput, "sparsity True"),
        ({"sparsity": "abc"}, InvalidInput, "sparsity 'abc'"),
        ({"sparsity": float("nan")}, InvalidInput, "sparsity nan"),
    ],
    ids=lambda value: " ".join(str(value).split())[:40],
)
def test_prune_weight_refuses(arguments, error, words):
    given = {"weight": MATRIX, "inputs": INPUTS, **arguments}
    with pytest.raises(error, match=words) as caught:
        sparity.prune_weight(given.pop("weight"), given.pop("inputs"), **given)
    assert type(caught.value) is error


def test_numpy_numbers_are_numbers():
    for half in (np.float32(0.5), np.float64(0.5)):
        _, keep = sparity.prune_weight(MATRIX, INPUTS, sparsity=half)
        assert int(keep.sum()) == 16


def test_a_singular_gram_is_damped_more_and_said_so(caplog):
    one_direction = torch.ones(5, 8)  # rank 1
    weight, keep = sparity.prune_weight(MATRIX, one_direction, solver="sparsegpt", damping=0.0)
    assert "weight: Gram matrix singular with damping 0, trying 0.01" in caplog.text
    assert bool(torch.isfinite(weight).all())
    expected, _ = sparity.prune_weight(MATRIX, one_direction, solver="sparsegpt", damping=0.01)
    assert torch.equal(weight, expected)
    assert int(keep.sum()) == int((weight != 0).sum())


def test_sizes_that_no_pattern_can_have():
    with pytest.raises(InvalidInput, match="pattern: give a name"):
        build_pattern(124)
    assert build_pattern({"2:4": None}) == build_pattern("2:4") == build_pattern({"n_of_m": {"n": 2, "m": 4}})
