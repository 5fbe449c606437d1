"""`sparity serve`: a server in a process of its own, and what it refuses at its start."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

import sparity as package
from sparity import zoo
from sparity.serve.execution.alone import Alone
from sparity.serve.execution.steps import Steps
from sparity.serve.served_model import open_model


def test_it_serves_until_it_is_told_to_stop(tmp_path):
    folder = shutil.copytree(zoo.path("llama"), tmp_path / "model")
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    command = ["serve", folder, "--name", "mine", "--port", 0, "--context", 128, "--chat-template", template]
    with subprocess.Popen(
        [sys.executable, "-m", "sparity", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SPARITY_API_KEY": "secret"},
    ) as process:
        first, second = process.stderr.readline(), process.stderr.readline()
        assert re.fullmatch(r"mine: .*; 128 tokens of context\n", first)
        url = re.fullmatch(r"listening at (http://127.0.0.1:\d+)/v1 \(interrupt to stop\)\n", second)[1]
        for file in folder.iterdir():  # whatever becomes of the folder, the server has what it needs
            file.write_bytes(b"\0" * 10)
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, timeout=30) as client:
            messages = [{"role": "user", "content": "The following"}]
            asked = {"model": "mine", "messages": messages, "max_tokens": 3}
            answer = client.post("/v1/chat/completions", json=asked).json()
            assert answer["usage"]["completion_tokens"] == 3
            assert httpx.get(f"{url}/v1/models").status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["zoo:none"], 'no model "none" in the zoo'),
        (["zoo:llama", "--context", 5000], "--context 5000: zoo:llama takes 2048 tokens"),
        (["zoo:llama", "--slots", 40], "40 requests at a time need 40 tokens in a step, not 32"),
        (["zoo:llama", "--chat-template", "missing.jinja"], "missing.jinja"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anybody_listens(sparity, arguments, words):
    done = sparity("serve", *arguments)
    assert done.code == 1
    assert words in done.err
    assert done.err.count("\n") == 1


def test_a_model_without_a_tokenizer(sparity, tiny_llama_folder):
    done = sparity("serve", tiny_llama_folder)
    assert (done.code, done.out) == (1, "")
    assert "has no tokenizer: a server needs the folder with its tokenizer.json" in done.err


def test_how_models_are_computed():
    assert isinstance(open_model("zoo:llama", context=64).execution, Steps)
    moe = open_model("zoo:moe", context=64).execution
    assert isinstance(moe, Alone)
    assert moe.words.startswith("one request after another, token by token (MixtralModel is none of LlamaModel, ")


@pytest.mark.parametrize(("runtime", "kind"), [("teal", Steps), ("griffin", Alone), ("snapkv", Alone)])
def test_folders_with_stages_at_run_time(tmp_path, runtime, kind):
    stage = {"cache": {"policy": runtime, "keep": 0.5}} if runtime == "snapkv" else {"activations": {"method": runtime}}
    recipe = {
        "model": "zoo:llama",
        "stages": [stage],
        "output": {"path": str(tmp_path / "out")},
        "measure": {"perplexity": [], "speed": None},
    }
    if runtime != "snapkv":
        recipe["calibration"] = {"text": "python-docs:calibration", "samples": 2, "length": 64}
    package.run(recipe)
    served = open_model(str(tmp_path / "out"), context=128)
    assert isinstance(served.execution, kind)
    assert isinstance(open_model(str(tmp_path / "out"), context=128, runtime=False).execution, Steps)
    assert served.execution.model.dtype == torch.bfloat16
    maps = Path("/proc/self/maps")
    mapped = maps.read_text() if maps.exists() else ""
    assert str(tmp_path) not in mapped  # its files may change while it is served
