"""A benchmark with models that are not there: fake times, so that every number is known."""

import json
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pages import Page, rows
from sparity.errors import InvalidInput, SparityError
from sparity.measure.data.bench_report import Skipped
from sparity.measure.data.report import Spread
from sparity.measure.show.page_bench import render_bench
from sparity.measure.show.table_bench import print_bench
from sparity.measure.timing import bench, memory_fit, peak_memory
from sparity.measure.timing.bench import IN_TURNS, Protocol
from sparity.measure.timing.contenders import Contender
from sparity.measure.timing.generation import Timed

SMALL = Protocol(8, 4, 3, (1, 2))
FACTORS = {"dense": 2.0, "<other>": 0.5, "subject": 1.0}  # seconds per token at batch 1


class Model:
    def __init__(self, name):
        self.name = name


@pytest.fixture
def timed(monkeypatch, tiny_llama_folder):
    """A function that runs a benchmark of three contenders with the given available memory."""
    calls = []

    def generate(model, ids, tokens):
        calls.append((model.name, tuple(ids.shape), tokens))
        seconds = FACTORS[model.name] * len(ids)
        return Timed(first_token=seconds * 10, token=seconds * (1 + 0.1 * (len(calls) % 2)))

    monkeypatch.setattr(Contender, "open", lambda self: Model(self.name))
    monkeypatch.setattr(bench, "time_generation", generate)
    monkeypatch.setattr(bench, "held_bytes", lambda model: int(FACTORS[model.name] * 1e9))
    monkeypatch.setattr(bench, "slow_note", lambda contender, model: "slow" if model.name == "<other>" else None)
    monkeypatch.setattr(bench, "stored_bytes", lambda contender: 1_000_000)
    monkeypatch.setattr(
        bench.peak_memory, "peak_memory", lambda contender, batches, *_: dict.fromkeys(batches, 3_000_000_000)
    )

    def run(available=None, protocol=SMALL):
        monkeypatch.setattr(memory_fit, "available_memory", lambda: available)
        every = [Contender(name, Path(tiny_llama_folder), "engine") for name in FACTORS]
        calls.clear()
        phases = []
        report = bench.bench(every, torch.arange(50), protocol, phases.append)
        return report, list(calls), phases

    return run


def test_contenders_are_interleaved_and_the_order_reverses(timed):
    report, calls, phases = timed()
    names = [name for name, shape, _ in calls if shape == (1, 8)]
    there, back = list(FACTORS), list(reversed(FACTORS))
    assert names == back + there + back + there
    assert {tokens for _, _, tokens in calls} == {4}
    assert report.interleaved
    assert phases == [*(f"measuring the memory of {name}" for name in FACTORS), "timing dense, <other>, subject"]


def test_times_ratios_and_memory(timed):
    report, _, _ = timed()
    assert report.model == "subject"
    assert report.batches == [1, 2]
    timing, ratio = report.at(2)[0]
    assert (timing.name, timing.batch, timing.peak_memory) == ("dense", 2, 3_000_000_000)
    assert timing.pace.first_token == Spread(40.0, 40.0, 40.0)
    assert timing.token.low == pytest.approx(4.0)
    assert timing.pace.decode.high == pytest.approx(0.5)  # 2 tokens in 4 s
    assert ratio.first_token == Spread(2.0, 2.0, 2.0)
    assert 2.0 / 1.1 - 1e-9 <= ratio.decode.low <= ratio.decode.high <= 2.0 * 1.1 + 1e-9
    assert [found for _, found in report.at(1)][-1] is None
    assert [runner.weight_bytes for runner in report.runners] == [2_000_000_000, 500_000_000, 1_000_000_000]
    assert report.notes == ("slow",)


def test_without_room_for_all_each_runs_by_itself_and_the_report_says_so(timed):
    report, calls, _ = timed(available=3_000_000)
    names = [name for name, _, _ in calls]
    assert names == [name for name in FACTORS for _ in range(2 * 4)]
    assert not report.interleaved
    assert report.notes[0] == IN_TURNS
    assert "each contender by itself" in Page(render_bench(report)).text


def test_a_batch_that_does_not_fit_is_skipped_and_none_at_all_is_an_error(timed):
    protocol = Protocol(8, 4, 1, (1, 1_000_000))
    report, _, _ = timed(available=100_000_000, protocol=protocol)
    assert report.batches == [1]
    assert [skip.batch for skip in report.skipped] == [1_000_000]
    with pytest.raises(InvalidInput, match="no batch fits into memory: batch 1 needs about"):
        timed(available=1000)


def test_what_does_not_fit_the_context_is_refused_before_anything_runs(timed):
    with pytest.raises(
        InvalidInput, match="bench, subject: a prompt of 4000 and 4 new tokens do not fit the model's context"
    ):
        timed(protocol=Protocol(4000, 4))


def test_the_page_shows_every_contender_at_every_batch(timed):
    report, _, _ = timed()
    text = render_bench(report)
    page = Page(text)
    assert "<other>" in page.text
    assert "<other>" not in text
    assert "At batch 1 subject decodes faster than dense: " in page.text
    assert "At batch 2 subject decodes slower than <other>: " in page.text
    assert "1 sequence at a time" in page.text
    assert "2 sequences at a time" in page.text
    shown = [row[0][0] for row in rows(text) if len(row) == 7 and row[0] != ["model"]]
    assert shown == [escape(name) for name in (*FACTORS, *FACTORS)]
    assert text.count("<svg") == 4


def test_the_terminal_says_what_was_not_run(timed, capsys):
    report, _, _ = timed()
    print_bench(replace(report, skipped=(Skipped(32, "batch 32 needs more"),)), Console(width=120))
    said = " ".join(capsys.readouterr().out.split())
    assert "Note: Not run: batch 32 needs more." in said
    assert "Note: slow" in said
    assert "subject decodes slower than <other>" in said


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_shows_every_ratio_whole(timed, capsys, width):
    report, _, _ = timed()
    print_bench(report, Console(width=width))
    said = capsys.readouterr().out
    table = said[: said.index("Weights are what")]
    assert table.count("2.00x") == 2  # against dense, at both batch sizes
    assert ("peak" in table) == (width == 120)
    assert ("subject: weights" in table) == (width == 80)


def test_the_report_is_json(timed):
    content = timed()[0].to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["format"] == 1


def test_a_process_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(SparityError, match=r"the memory of gone ended with code 1: .*has no config.json"):
        peak_memory.peak_memory(Contender("gone", tmp_path, "transformers"), [1], 4, 2)
