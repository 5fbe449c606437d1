"""Models and texts that tests share."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from families import build, tiny_configs

os.environ["SPARITY_CHOICE"] = "rules"  # tests time nothing; those of choosing bring a clock of their own
if not torch.cuda.is_available():  # before anything imports Triton, whose kernels then run on the processor
    os.environ["TRITON_INTERPRET"] = "1"

ASSETS = Path(os.environ.get("SPARITY_TEST_ASSETS", Path(__file__).parents[2] / "shared"))

WANTING = "zoo:smollm2 is not on this machine (sparity fetch smollm2, which make test tries, says why)"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices this small gain nothing from a second thread, and tests that run side by side lose much."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family_models():
    """A tiny random model per family, by model type."""
    return {name: build(config) for name, config in tiny_configs().items()}


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory, family_models):
    """A tiny random Llama, saved."""
    folder = tmp_path_factory.mktemp("tiny-llama") / "model"
    family_models["llama"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mixtral_folder(tmp_path_factory, family_models):
    """A tiny random Mixtral, saved."""
    folder = tmp_path_factory.mktemp("tiny-mixtral") / "model"
    family_models["mixtral"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory, family_models):
    """A tiny random GPT-2, saved."""
    folder = tmp_path_factory.mktemp("tiny-gpt2") / "model"
    family_models["gpt2"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """Random token ids below 97: `calibration` [6, 24] and `text` [400] as .npy files."""
    folder = tmp_path_factory.mktemp("tokens")
    drawn = np.random.default_rng(0)
    np.save(folder / "calibration.npy", drawn.integers(0, 97, (6, 24)))
    np.save(folder / "text.npy", drawn.integers(0, 97, 400))
    return {"calibration": str(folder / "calibration.npy"), "text": str(folder / "text.npy")}


@pytest.fixture(scope="session")
def smollm2():
    """The folder of `zoo:smollm2`, which `make test` fetches."""
    from sparity.models import fetched

    if not fetched.is_fetched("smollm2"):
        pytest.skip(WANTING)
    return fetched.place("smollm2")


def pytest_terminal_summary(terminalreporter):
    """Say how much was not tested for want of the real model: a run without it must not look like one with it."""
    skipped = sum(WANTING in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests skipped: {WANTING}", yellow=True)


@pytest.fixture(scope="session")
def assets():
    """The folder of real models and texts."""
    if not ASSETS.is_dir():
        pytest.skip(f"no test assets: {ASSETS} does not exist (set SPARITY_TEST_ASSETS)")
    return ASSETS


@pytest.fixture(scope="session")
def stories_model(assets):
    """A small real Llama (969,216 parameters, context 256)."""
    return assets / "models" / "babyllama-byte361-960K"


@pytest.fixture(scope="session")
def stories(assets):
    """Stories as lists of documents: `calibration` and `held_out`."""
    folder = assets / "data" / "tinystories-sample"
    return {
        "calibration": json.loads((folder / "calib.json").read_text()),
        "held_out": json.loads((folder / "eval.json").read_text()),
    }
