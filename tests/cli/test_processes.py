"""`sparity run` as torchrun starts it: one process per rank, found through the environment."""

import json
import multiprocessing
import os
import socket
import sys

import pytest
import torch
import yaml

from interruptions import contents
from sparity.calibration import chunks
from sparity.cli.main import main

RECIPE = {
    "model": "zoo:moe",
    "calibration": {"text": "python-docs:calibration", "samples": 4, "length": 32},
    "stages": [{"prune": {"score": "wanda", "unseen_expert": "magnitude"}}],
    "measure": {"perplexity": ["python-docs:held-out"], "window": 48, "windows": 2, "speed": None},
    "accept": {"kl": 1e-9},  # missed
}


def command(rank, size, port, arguments, log):
    """A process of the command line, its output in a file; it exits with the command's code."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["sparity", *arguments]
        main()


def started(size, arguments, folder):
    """Exit codes and outputs of all ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context, logs = multiprocessing.get_context("fork"), [folder / f"rank-{rank}.txt" for rank in range(size)]
    ranks = [
        context.Process(target=command, args=(rank, size, port, arguments, logs[rank]), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks], [log.read_text() for log in logs]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "FEWEST", 1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def test_rank_0_alone_prints_and_all_exit_alike(tmp_path, recipe):
    results = {}
    for size in (1, 2):
        output = tmp_path / str(size)
        codes, said = started(size, ["run", recipe, "-o", str(output), "--device", "cpu", "--json"], tmp_path)
        assert codes == [1] * size  # the limit is missed
        assert json.loads(said[0][: said[0].rindex("}") + 1])["candidates"][0]["quality"]
        assert "not accepted" in said[0]
        assert said[1:] == [""] * (size - 1)
        results[size] = {name: digest for name, digest in contents(output).items() if name.startswith("model")}
    assert results[1] == results[2]


def test_what_several_processes_cannot_do_is_refused(tmp_path):
    codes, said = started(2, ["doctor"], tmp_path)
    assert codes == [2, 2]
    assert "doctor works in one process: start it without torchrun (WORLD_SIZE=2" in said[0]
