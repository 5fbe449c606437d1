"""A run that is killed at any moment resumes, and its files are those of an uninterrupted run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import sparity
from interruptions import Killed, dies_at, weight_files
from sparity.errors import CorruptFile
from sparity.pipeline.run import runner
from sparity.products import panels
from sparity.products.choice import emulated_types
from sparity.recipe import Recipe

SCRIPT = """
import sys, time
import sparity.pipeline.run.runner as runner
from sparity.recipe import Recipe

class Told(runner.Silence):
    def phase(self, words):
        print(words, flush=True)
    def block(self, done, total, seconds):
        print("block", done, flush=True)
        time.sleep(0.2)

runner.execute(Recipe.read(sys.argv[1]), Told(), output=sys.argv[2], resume=True)
"""


def recipe(token_files, folder, order="sequential"):
    return Recipe.read(
        {
            "model": str(folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 4},
            "stages": [{"prune": {"solver": "sparsegpt", "order": order}}],
            "measure": {"speed": None},
        }
    )


@pytest.mark.parametrize("order", ["sequential", "independent"])
def test_killed_before_every_single_rename(tiny_llama_folder, token_files, tmp_path, order):
    plan = recipe(token_files, tiny_llama_folder, order)
    whole = sparity.run(plan, output=tmp_path / "whole").path
    expected = weight_files(whole)
    assert len(expected) == 4
    died = 0
    for count in range(1, 100):
        output = tmp_path / f"killed-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(plan, output=output)
                break  # fewer renames than that: the run went through
            except Killed:
                died += 1
        assert not output.exists()
        resumed = sparity.run(plan, output=output, resume=True)
        assert weight_files(resumed.path) == expected
        assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())
        assert not output.with_name(output.name + ".partial").exists()
    # manifest, first shard, three blocks of shard and progress, then index, configuration and so on
    assert died >= 2 + 3 * 2 + 4


def test_finished_blocks_are_not_done_again(tiny_llama_folder, token_files, tmp_path, monkeypatch):
    plan = recipe(token_files, tiny_llama_folder)
    with pytest.MonkeyPatch.context() as patch:
        dies_at(1 + 1 + 1 + 2 * 2 + 1, patch)  # in the third block
        with pytest.raises(Killed):
            sparity.run(plan, output=tmp_path / "out")
    from sparity.static.prune.pruning import Pruning

    applied = []
    apply = Pruning.apply
    monkeypatch.setattr(Pruning, "apply", lambda self, *a: applied.append(1) or apply(self, *a))
    sparity.run(plan, output=tmp_path / "out", resume=True)
    assert len(applied) == 7  # the projections of one block


def test_resume_uses_the_thread_count_of_the_start(tiny_llama_folder, token_files, tmp_path):
    plan = recipe(token_files, tiny_llama_folder)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        dies_at(5, patch)
        with pytest.raises(Killed):
            sparity.run(plan, output=tmp_path / "out")
    try:
        torch.set_num_threads(before + 1)
        result = sparity.run(plan, output=tmp_path / "out", resume=True)
        assert result.report.candidates[0].effort.threads == before
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_resume_goes_on_with_the_products_of_the_start(tiny_llama_folder, token_files, tmp_path, monkeypatch):
    multiply = panels.multiply
    monkeypatch.setattr(panels, "FEW", 0)
    monkeypatch.setattr(panels, "multiply", lambda *a: multiply(*a) * 1.25)  # so that bits tell which products ran
    plan = recipe(token_files, tiny_llama_folder).model_copy(update={"dtype": "bfloat16"})
    bits = {}
    for begun, later in (("float32", "own"), ("own", "float32")):
        monkeypatch.setenv("SPARITY_PRODUCTS", begun)
        bits[begun] = weight_files(sparity.run(plan, output=tmp_path / f"whole-{begun}").path)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(5, patch)
            with pytest.raises(Killed):
                sparity.run(plan, output=tmp_path / begun)
        monkeypatch.setenv("SPARITY_PRODUCTS", later)
        assert weight_files(sparity.run(plan, output=tmp_path / begun, resume=True).path) == bits[begun]
    assert bits["float32"] != bits["own"]


def test_an_unfinished_run_that_knew_no_products_goes_on_with_its_own(tiny_llama_folder, token_files, tmp_path):
    manifest = tmp_path / "out.partial" / ".sparity" / "manifest.json"
    with pytest.MonkeyPatch.context() as patch:
        dies_at(5, patch)
        with pytest.raises(Killed):
            sparity.run(recipe(token_files, tiny_llama_folder), output=tmp_path / "out")
    written = json.loads(manifest.read_text())
    assert written.pop("emulated_products") == []
    manifest.write_text(json.dumps({**written, "emulated_products": ["int3"]}))
    with pytest.raises(CorruptFile, match=r"emulated_products: \['int3'\].*start again with --force"):
        sparity.run(recipe(token_files, tiny_llama_folder), output=tmp_path / "out", resume=True)
    manifest.write_text(json.dumps(written))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARITY_PRODUCTS", "float32")
        seen = []
        monitored = runner._work
        patch.setattr(runner, "_work", lambda *a: seen.append(emulated_types()) or monitored(*a))
        sparity.run(recipe(token_files, tiny_llama_folder), output=tmp_path / "out", resume=True)
    assert seen == [frozenset()]


def test_a_real_process_killed_at_random_moments(tiny_llama_folder, token_files, tmp_path):
    plan = recipe(token_files, tiny_llama_folder)
    expected = weight_files(sparity.run(plan, output=tmp_path / "whole").path)
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(json.dumps(plan.model_dump(mode="json")))
    command = [sys.executable, "-c", SCRIPT, str(path), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wanted, delay in (("prune", 0.02), ("block", 0.1), ("block", 0.0)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for line in process.stdout:
            if line.startswith(wanted):
                time.sleep(delay)
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not output.exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    assert weight_files(output) == expected
