import math
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from sparity.measure.data.report import Spread
from sparity.measure.show.table import print_report, render_table


def printed(report, width=140):
    console = Console(file=StringIO(), width=width)
    print_report(report, console)
    return console.file.getvalue()


def lines(report):
    return [line.split() for line in printed(report).splitlines()]


def test_dense_comes_first_then_a_row_per_candidate(report):
    assert lines(report)[:6] == [
        ["Qwen/Qwen2.5-0.5B,", "perplexity", "on", "wikitext-2"],
        ["model", "sparsity", "perplexity", "change", "KL", "top-1", "tokens/s"],
        ["dense", "0.0", "%", "13.07", "9.12"],
        ["wanda-50", "50.2", "%", "15.19", "+16.2", "%", "0.1523", "80.1", "%", "7.93"],
        ["poor", "0.87x"],
        ["slower"],
    ]


def test_table_has_one_row_per_model_for_one_text_and_more_for_two(make_report):
    assert render_table(make_report(7)).row_count == 8
    assert render_table(make_report(7, texts=("wikitext-2", "c4"))).row_count == 8 * 3


def test_several_texts_have_rows_of_their_own(make_report):
    found = lines(make_report(1, texts=("wikitext-2", "c4")))
    assert found[0] == ["Qwen/Qwen2.5-0.5B"]
    assert ["c4", "13.07"] in found
    assert ["c4", "15.19", "+16.2", "%", "0.1523", "80.1", "%"] in found


def test_a_text_that_only_one_candidate_measured_is_named(make_report):
    two = make_report(2, texts=("wikitext-2", "c4"))
    second = replace(two.candidates[1], quality=two.candidates[1].quality[1:])
    found = lines(replace(two, candidates=(two.candidates[0], second)))
    row = next(place for place, words in enumerate(found) if words[:1] == ["magnitude-50"])
    assert found[row + 3] == ["c4", "44.44", "+240.0", "%", "0.1523", "80.1", "%"]


@pytest.mark.parametrize("texts", [("wikitext-2",), ("wikitext-2", "c4")])
def test_everything_fits_80_columns_and_nothing_is_cut(make_report, texts):
    seven = make_report(7, texts=texts)
    quality = tuple(
        replace(item, perplexity=math.inf, change=math.inf, grade="acceptable") for item in seven.candidates[5].quality
    )
    long = replace(seven.candidates[5], name="a-name-so-long-that-it-has-to-be-folded", quality=quality)
    text = printed(replace(seven, candidates=(*seven.candidates[:5], long, seven.candidates[6])), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert " 1.31x\n" in text
    assert " 1.02x\n" in text
    assert any(line.split()[-2:] == ["on", "par"] for line in text.splitlines())


def test_a_dense_speed_that_varied_is_shown_as_a_range(make_report):
    two = make_report(2)
    speed = two.candidates[1].speed
    slower = replace(speed, dense=replace(speed.dense, decode=replace(speed.dense.decode, median=8.7)))
    found = lines(replace(two, candidates=(two.candidates[0], replace(two.candidates[1], speed=slower))))
    assert found[2] == ["dense", "0.0", "%", "13.07", "8.70-9.12"]


def test_what_was_not_measured_is_a_dash(report):
    bare = replace(report.candidates[0], quality=(), speed=None)
    found = lines(replace(report, candidates=(bare,)))
    assert found[2] == ["dense", "0.0", "%", "-", "-", "-", "-", "-"]
    assert found[3] == ["wanda-50", "50.2", "%", "-", "-", "-", "-", "-"]


def test_notes_and_verdicts_stand_under_the_table(report):
    under = printed(report).split("\n\n")[1]
    assert under.startswith("Weight files: dense 988.1 MB; exported 988.1 MB (")
    assert "\nNote: Zeros are stored like other numbers in a plain export" in under
    assert "MISSED  wanda-50: decode 1.3x, reached 0.87x" in under
    assert "pass    wanda-50: perplexity +20%, reached +16.2%" in under


def test_names_are_not_read_as_markup(hostile):
    text = printed(hostile)
    assert '<script>alert("x")</script>, perplexity on a|b [x](http://e.com)' in text
    assert "\n[red]<script>  " in text
    assert "reached [bold]1[/bold]" in text


def test_dense_on_our_kernels_has_a_row_and_a_ratio(on_engine):
    found = lines(on_engine)
    assert ["dense,", "our", "kernels", "-", "-", "-", "-", "15.8"] in found
    assert ["1.50x", "ours"] in found
    assert '"ours": The ratio to dense on our kernels is what sparsity gives' in printed(on_engine)
    assert "ours" not in printed(replace(on_engine, candidates=on_engine.candidates[:0]))
    assert max(map(len, printed(on_engine, width=80).splitlines())) <= 80


def test_what_is_left_and_what_is_skipped_stand_below_the_zeros(kinds):
    def column(kind):
        text = printed(kinds[kind]).split("\n\n")[0]
        lines = [line[: line.index("%") + 10] for line in text.splitlines()[3:] if "%" in line]
        found = [re.search(r"(?<!\+)\b[\d.]+ %(?: left| skipped)?", line) for line in lines]
        return [match.group() for match in found if match]

    assert column("pruned") == ["50.0 %"]
    assert column("cut") == ["0.0 %", "88.0 % left"]
    assert column("skipping") == ["0.0 %", "41.0 % skipped"]
    assert column("all") == ["50.0 %", "88.0 % left", "40.6 % skipped"]
    assert column("nothing") == ["0.0 %"]


def test_every_kind_of_change_fits_80_columns_and_nothing_is_cut(every_kind, on_engine):
    speed = replace(on_engine.candidates[0].speed, decode_ratio=Spread(2.6, 2.5, 2.7))
    timed = tuple(
        replace(each, speed=speed, name=f"{each.name}, and a name that has to be folded")
        for each in every_kind.candidates
    )
    text = printed(replace(every_kind, candidates=timed), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "88.0 % left" in text
    assert "40.6 % skipped" in text
    assert text.count("1.50x ours") == 7
