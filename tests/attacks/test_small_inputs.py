"""Small inputs that stand for enormous work: refused within seconds and little memory.

Those that need no model run in one process with limits of its own: the system ends it when it takes more.
"""

import json
import resource
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import mutants
import sparity
from sparity.calibration.tokens import Windows, draw_windows
from sparity.checkpoints import packed, packed_file
from sparity.checkpoints.shards import unique_json
from sparity.checkpoints.source import CheckpointSource
from sparity.cli.main import app
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_format
from sparity.models import size_check
from sparity.pipeline.run.packing import convert
from sparity.recipe import Recipe
from sparity.recipe_file import MOST_VALUES, parse_yaml

SECONDS, MEMORY = 40, 2 * 2**30  # of processor time and address space

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
YAML = {
    "a billion laughs": LAUGHS,
    "one alias": "model: &m x\ndtype: *m",
    "an alias of itself": "model: &m [*m]",
    "an alias as a key": "? &k x\n: 1\n? *k\n: 2",
    "a merge of aliases": "a: &a {x: 1}\nb: {<<: *a}",
    "merges without aliases": "stages:\n- prune: " + "{<<: [" * 200 + "]}" * 200,
    "50,000 keys": "".join(f"k{n}: 1\n" for n in range(50_000)),
    "50,000 keys in a line": "{" + ", ".join(f"k{n}: 1" for n in range(50_000)) + "}",
    "50,000 keys, the last twice": "".join(f"k{n}: 1\n" for n in range(50_000)) + "k49999: 1\n",
    "9,000 keys, the last twice": "".join(f"k{n}: 1\n" for n in range(4_900)) + "k4899: 1\n",
    "9,000 keys": "".join(f"k{n}: 1\n" for n in range(4_900)),
    "50,000 items": "stages: [" + "1," * 50_000 + "]",
    "50,000 overrides": "stages: [{prune: {overrides: {" + ", ".join(f"k{n}: 0" for n in range(50_000)) + "}}}]",
    "deep lists": "stages: " + "[" * 100_000,
    "deep mappings": "stages: " + "{a: " * 100_000,
    "a deep block": "- " * 100_000,
    "a file of 100 MB": "# " + "x" * 100_000_000,
    "a word of 1 MB": "model: " + "x" * 1_000_000 + "\nmodle: 1",
    "a million brackets": "[" * 1_000_000,
}
CHILD = """
import sys
from sparity.errors import SparityError
from sparity.recipe import Recipe
from sparity.sweep_file import Sweep
for path in sys.argv[1:]:
    for read in (Recipe.read, Sweep.read):
        try:
            read(path)
        except SparityError as error:
            print(len(str(error)), str(error)[-300:].encode("ascii", "replace").decode())
        else:
            print("taken", path)
"""


def limited():
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def test_yaml_is_refused_within_bounds(tmp_path):
    paths = []
    for number, text in enumerate(YAML.values()):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(text)
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, preexec_fn=limited, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(paths)
    assert not [line for line in lines if line.startswith("taken") or int(line.split()[0]) > 2000]


@pytest.mark.parametrize("place", ["sparsity", "overrides", "dense", "score"])
def test_aliases_are_refused_wherever_they_stand(recipe, tmp_path, place):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{LAUGHS}stages: [{{prune: {{{place}: *a11}}}}]")
    with pytest.raises(CorruptFile, match=r"line 2, column 10: \*a0 is an alias: write the value out"):
        Recipe.read(path)
    with pytest.raises(InvalidInput, match="is an alias"):
        Recipe.read(recipe(), [f"stages.0.prune.{place}=[&a [1], *a]"])
    with pytest.raises(InvalidInput, match="is an alias"):
        Recipe.read(recipe(), ["stages.0.prune.score=[&a [1], *a]"])


def test_as_many_values_as_are_read():
    assert len(parse_yaml("[" + "1," * (MOST_VALUES - 1) + "]")) == MOST_VALUES - 1
    with pytest.raises(ValueError, match="more than 10,000 keys and values"):
        parse_yaml("[" + "1," * MOST_VALUES + "]")


def test_a_key_that_stands_twice_is_named_with_its_line():
    with pytest.raises(ValueError, match='line 3, column 1: the key "b" stands twice'):
        parse_yaml("b: 1\nc: 1\nb: 2")


LIMITS = [
    ({"calibration": {"text": ["x"], "samples": 10**12}}, r"calibration\.samples: .*less than or equal to 1000000"),
    ({"calibration": {"text": ["x"], "length": 10**12}}, r"calibration\.length: .*less than or equal to 1000000"),
    ({"measure": {"speed": {"rounds": 10**9}}}, r"measure\.speed\.rounds: .*less than or equal to 1000"),
    ({"measure": {"speed": {"batch": [10**9]}}}, r"measure\.speed\.batch\.0: .*less than or equal to 65536"),
    ({"measure": {"speed": {"batch": [1] * 1000}}}, r"measure\.speed\.batch: .*at most 16 items"),
    ({"measure": {"speed": {"prompt": 10**12}}}, r"measure\.speed\.prompt: .*less than or equal to 1000000"),
    ({"measure": {"speed": {"tokens": 10**12}}}, r"measure\.speed\.tokens: .*less than or equal to 1000000"),
]


@pytest.mark.parametrize(("sections", "words"), LIMITS, ids=lambda value: str(value)[:50])
def test_numbers_beyond_all_use(recipe, refused, sections, words):
    refused({**recipe(), **sections}, InvalidInput, words)


def test_an_override_of_very_many_parts(recipe):
    with pytest.raises(InvalidInput, match="a key has at most 32 parts"):
        Recipe.read(recipe(), [".".join(["stages.0.prune.score"] + ["a"] * 100_000) + "=1"])


def test_many_problems_are_not_all_listed(recipe):
    with pytest.raises(InvalidInput, match=r"k9: unknown key.*; and more$"):
        Recipe.read({**recipe(), **{f"k{number}": 1 for number in range(50_000)}})


def test_windows_that_do_not_fit_into_memory_are_refused_before_any_is_drawn():
    def tokenizer(text, verbose):
        raise AssertionError("a text was read")

    with pytest.raises(InvalidInput, match=r"1,000,000 samples of 1,000,000 tokens would take 8,000\.0 GB of memory"):
        draw_windows(["text"], tokenizer, Windows(10**6, 10**6))


def test_a_batch_that_does_not_fit_into_memory_is_refused_before_anything_runs(recipe, refused, monkeypatch):
    monkeypatch.setattr("sparity.memory.available_memory", lambda: 10**6)
    speed = {"batch": [1, 4096], "prompt": 8, "tokens": 4}
    refused({**recipe(), "measure": {"speed": speed}}, InvalidInput, "batch: 4,096 sequences at once would take")


def test_plan_says_what_an_allowed_request_would_take(recipe, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe()))
    enough = CliRunner().invoke(app, ["plan", str(path)])
    assert (enough.exit_code, "more than the" in enough.stdout) == (0, False)
    monkeypatch.setattr("sparity.models.size_check.check_memory", lambda *_: None)
    monkeypatch.setattr("sparity.memory.available_memory", lambda: 2000)
    short = CliRunner().invoke(app, ["plan", str(path)])
    assert short.exit_code == 0
    assert "that is more than the 2.0 kB of memory that are free here" in short.stdout


SIZES = [
    ("num_hidden_layers", 2000, "config.json says 2,000 layers, and the files hold 3"),
    ("vocab_size", 10**9, "config.json describes 64,000,027,872 parameters, and the files hold 34,080"),
    ("hidden_size", 10**6, "parameters, and the files hold 34,080"),
    ("intermediate_size", 10**9, "parameters, and the files hold 34,080"),
    ("head_dim", 10**8, "parameters, and the files hold 34,080"),
    ("num_key_value_heads", 10**8, "parameters, and the files hold 34,080"),
]


@pytest.mark.parametrize(("key", "value", "words"), SIZES)
def test_a_configuration_of_more_than_the_files_hold(recipe, refused, model_copy, key, value, words):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, key: value}))
    refused(recipe(model=str(model_copy)), CorruptFile, words)
    with pytest.raises(CorruptFile, match=words):
        sparity.load(model_copy)
    with pytest.raises(CorruptFile, match=words):
        convert(model_copy, model_copy.with_name("packed"))


def test_a_configuration_whose_tables_do_not_fit_into_memory(tiny_llama_folder, monkeypatch):
    monkeypatch.setattr("sparity.memory.available_memory", lambda: 10)
    with pytest.raises(InvalidInput, match="what the model computes from its configuration would take"):
        sparity.load(tiny_llama_folder)


def test_models_as_they_are_pass(family_models, tmp_path):
    for name, model in family_models.items():
        model.save_pretrained(tmp_path / name)
        source = CheckpointSource(tmp_path / name)
        size_check.check_sizes(tmp_path / name, model.config, source.shapes())


COUNT = 100_000


def test_a_name_that_stands_twice_is_found_at_once():
    pairs = [f'"name{number}":0' for number in range(COUNT)]
    with pytest.raises(ValueError, match=f"'name{COUNT - 1}' is there twice"):
        unique_json("{" + ",".join([*pairs, pairs[-1]]) + "}")


@pytest.fixture
def packed_path(tmp_path):
    """A packed file of one matrix."""
    packed.write_shard(tmp_path / "a.safetensors", {"a": build_format("csr").pack(torch.eye(8))}, {}, [])
    return tmp_path / "a.safetensors"


def rewritten(path, edit):
    """The file after `edit(header)`; its tensors stay where they are."""
    header, _ = mutants.split(content := path.read_bytes())
    data = content[8 + int.from_bytes(content[:8], "little") :]
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_very_many_names_of_matrices(packed_path):
    """Entries without tensors, the last name twice."""

    def twice(header):
        about = json.dumps(json.loads(header["__metadata__"]["sparity"])["matrices"]["a"])
        names = [*(f"n{number}" for number in range(COUNT)), f"n{COUNT - 1}"]
        entries = ",".join(f'"{name}":{about}' for name in names)
        header["__metadata__"]["sparity"] = f'{{"version":1,"matrices":{{{entries}}}}}'

    rewritten(packed_path, twice)
    for read in (packed_file.read, packed.matrices):
        with pytest.raises(CorruptFile, match=f"n{COUNT - 1}' is there twice"):
            read(packed_path)


def test_very_many_transposed_names(packed_path):
    def turned(header):
        header["__metadata__"][packed.TRANSPOSED] = json.dumps(["a"] * COUNT + ["b"])

    rewritten(packed_path, turned)
    with pytest.raises(CorruptFile, match="transposed that are not there"):
        packed.matrices(packed_path)


def test_very_many_kinds_of_tensors(tiny_llama_folder, tmp_path):
    """Every one would be held against every name of the files while a model is loaded."""
    folder = tmp_path / "packed"
    convert(tiny_llama_folder, folder, "int8")
    shard = next(path for path in sorted(folder.glob("sparity-*")) if packed.matrices(path))
    index = json.loads((folder / packed.INDEX).read_text())

    def more(header):
        about = json.loads(header["__metadata__"]["sparity"])
        name, entry = next(iter(about["matrices"].items()))
        entry = {key: value for key, value in entry.items() if key != "hash"}
        parts = [f"p{number}" for number in range(100)]
        entry["hashes"] = entry["hashes"] | dict.fromkeys(parts, "0")
        about["matrices"][name] = {**entry, "hash": packed_file.entry_hash(entry)}
        header["__metadata__"]["sparity"] = json.dumps(about)
        end = max(each["data_offsets"][1] for key, each in header.items() if key != "__metadata__")
        for part in parts:
            header[f"{name}.{part}"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
            index["weight_map"][f"{name}.{part}"] = shard.name

    rewritten(shard, more)
    (folder / packed.INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match=r"its matrices have 10[0-9] kinds of tensors"):
        sparity.load(folder)
