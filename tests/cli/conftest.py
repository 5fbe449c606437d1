"""The command line in this process, with a tiny model whose context has room for the default speed test."""

import json
import shutil
from dataclasses import dataclass

import pytest
from typer.testing import CliRunner

from sparity.cli.main import app


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="session")
def sparity():
    """A function that runs `sparity` with the given arguments; a traceback fails the test."""

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.stderr
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def model(tiny_llama_folder, tmp_path_factory):
    """The tiny Llama with a context of 128 tokens."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path_factory.mktemp("wide") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    return folder


@pytest.fixture
def recipe_file(model, token_files, tmp_path):
    """A function that writes a recipe in YAML, with some sections replaced."""

    def write(prune=None, **sections):
        content = {
            "model": str(model),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{"prune": prune or {}}],
            "measure": {"perplexity": [token_files["text"]], "window": 32, "speed": None},
            **sections,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        return path

    return write
