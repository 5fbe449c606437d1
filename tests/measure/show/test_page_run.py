import math
import re
from dataclasses import replace

import pytest

from pages import Page, rows
from sparity.measure.data.report import LargerModel, Spread
from sparity.measure.show.page_run import render_html

KINDS = ("pruned", "cut", "skipping", "quantised", "healed", "nothing", "all", "every")


def row_of(page, name, width):
    """The cells of a candidate's row in the table that has `width` columns."""
    return next([" ".join(cell) for cell in row] for row in rows(page) if row[0][:1] == [name] and len(row) == width)


@pytest.fixture(params=["one", "seven", "hostile", "bare", "broken", "deep", *KINDS])
def any_page(request, make_report, hostile, kinds, every_kind):
    one, seven = make_report(1), make_report(7)
    bare = replace(one.candidates[0], quality=(), speed=None, verdicts=(), notes=(), changes=())
    infinite = replace(one.candidates[0].quality[0], perplexity=math.inf, change=math.inf, kl=math.inf)
    broken = replace(one.candidates[0], quality=(infinite,))
    reports = {"one": one, "seven": seven, "hostile": hostile, "deep": make_report(1, blocks=80, texts=("a", "b"))}
    reports |= {"bare": replace(one, candidates=(bare,)), "broken": replace(one, candidates=(broken,))}
    reports |= {**kinds, "every": every_kind}
    return render_html(reports[request.param])


def test_page_is_balanced_and_self_contained(any_page):
    page = Page(any_page)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not {"src", "href", "style", "onclick"} & {name for name, _ in page.attributes}
    style = re.search(r"<style>(.*?)</style>", any_page, re.DOTALL).group(1)
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_summary_says_what_was_done_what_it_cost_and_that_it_is_slower(report):
    text = Page(render_html(report)).text
    assert "Qwen2ForCausalLM, 494.0 million parameters, 24 blocks, bfloat16" in text
    assert (
        "50.2 % of the weights in 168 projections are zero (target 50.0 %), "
        "36.2 % of all parameters. Perplexity went from 13.07 to 15.19 on wikitext-2 (+16.2 %, poor). "
        "Decoding is slower than dense: 0.87x [0.85x-0.90x], 7.93 against 9.12 tokens/s. "
        "The weight files take 988.1 MB (as before)."
    ) in text
    assert '<b class="bad">0.87x, slower</b>' in render_html(report)


def test_a_speed_up_is_called_faster_and_a_tie_on_par(seven):
    text = Page(render_html(seven)).text
    assert "two-of-four-50. 50.2 % sparse. Perplexity went" in text
    assert "Decoding is faster than dense: 1.31x [1.29x-1.34x]" in text
    assert "Decoding is on par with dense: 1.02x [1.00x-1.05x]" in text
    assert text.count("Decoding is slower than dense") == 3


def test_tables_hold_the_measurements(report):
    page = render_html(report)
    assert row_of(page, "dense", 7) == ["dense", "0.0 %", "0.0 %", "988.1 MB", "", "", ""]
    assert row_of(page, "wanda-50", 7) == [
        "wanda-50",
        "50.2 % target 50.0 %",
        "36.2 %",
        "988.1 MB dense 988.1 MB",
        "12 min 05 s",
        "3.2 GB",
        "262,144",
    ]
    assert row_of(page, "dense", 6) == ["dense", "13.07", "", "", "0.0000", "100.0 %"]
    assert row_of(page, "wanda-50", 6) == ["wanda-50", "13.07 → 15.19", "+16.2 %", "poor", "0.1523", "80.1 %"]
    assert '<span class="bad">poor</span>' in page
    speed = next([" ".join(cell) for cell in row] for row in rows(page) if len(row) == 7 and "slower" in str(row))
    assert speed == [
        "wanda-50",
        "9.12 [8.80-9.40]",
        "7.93 [7.66-8.18]",
        "0.87x, slower [0.85x-0.90x]",
        "850 ms [840 ms-910 ms]",
        "880 ms [860 ms-930 ms]",
        "0.97x, on par [0.91x-1.06x]",
    ]


def test_each_batch_size_has_its_row_and_its_protocol(report):
    candidate = report.candidates[0]
    batched = replace(candidate.speed, batch=8, decode_ratio=Spread(1.5, 1.4, 1.6))
    page = render_html(replace(report, candidates=(replace(candidate, batched=(batched,)),)))
    found = [" ".join(row[0]) + " " + row[3][0] for row in rows(page) if len(row) == 7 and row[0][-2:-1] == ["batch"]]
    assert found == ["wanda-50 batch 1 0.87x,", "wanda-50 batch 8 1.50x,"]
    assert "one by one, batch 8; median of 5 rounds" in Page(page).text


def test_dense_row_is_first_and_only_it_is_set_apart(make_report):
    plain = make_report(1)
    page = render_html(replace(plain, candidates=(replace(plain.candidates[0], name="dense"),)))
    assert page.count('<tr class="dense">') == 2  # size and quality
    assert '</thead><tbody><tr class="dense"><td>dense</td><td>0.0 %</td>' in page


def test_notes_are_prominent_and_said_once(seven):
    note = seven.candidates[0].notes[0]
    assert render_html(seven).count(f'<p class="note">{note}</p>') == 1
    fewer = (replace(seven.candidates[0], notes=()), *seven.candidates[1:3])
    page = render_html(replace(seven, candidates=fewer))
    assert f'<p class="note"><b>magnitude-50 and sparsegpt-50:</b> {note}</p>' in page


def test_verdicts_are_marked_in_words(report):
    text = Page(render_html(report)).text
    assert "Acceptance: ✗ missed , 1 of 2 limits kept." in text
    assert "✗ missed decode 1.3x, reached 0.87x" in text
    assert "✓ pass perplexity +20%, reached +16.2%" in text


def test_footer_names_machine_and_versions(report):
    text = Page(render_html(report)).text
    footer = "processor Example 9000 cores 8 memory 16.0 GB gpu none python 3.11.7 sparity 0.1.0"
    assert text.endswith(f"Machine and versions {footer}")


def test_hostile_names_appear_as_text(hostile):
    page = render_html(hostile)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;") > 10
    assert 'alert("x")' in Page(page).text


def test_what_was_not_measured_is_said_and_not_drawn(report):
    bare = replace(report.candidates[0], quality=(), speed=None, changes=(), verdicts=())
    page = render_html(replace(report, candidates=(bare,)))
    assert "Quality was not measured. Speed was not measured." in Page(page).text
    assert "<svg" not in page
    assert "Acceptance" not in page
    assert '<td class="' not in page


def test_infinite_and_huge_perplexity(report):
    quality = report.candidates[0].quality[0]
    infinite = replace(quality, perplexity=math.inf, change=math.inf)
    huge = replace(quality, text="c4", perplexity=1e9, change=1e9 / 13.07 - 1)
    page = render_html(replace(report, candidates=(replace(report.candidates[0], quality=(infinite, huge)),)))
    assert "from 13.07 to inf on wikitext-2 (inf, poor) and from 13.07 to 1.0e9 on c4 (7.7e7x, poor)" in page
    assert page.count("Perplexity against sparsity on") == 4  # two drawings, each with a label and a title


def test_page_of_seven_has_a_plot_of_each_kind(seven):
    page = render_html(seven)
    assert page.count("<svg") == 1 + 2 + 7 * 2
    assert page.count("Zeros by block and role</figcaption>") == 7


def test_dense_on_our_kernels_has_a_tile_a_row_and_a_bar_of_its_own(on_engine):
    page = render_html(on_engine)
    text = Page(page).text
    assert (
        "Decoding is faster than dense in transformers: 2.60x [2.50x-2.70x], 23.7 against 9.12 tokens/s and faster "
        "than dense on our kernels: 1.50x [1.40x-1.60x], 23.7 against 15.8 tokens/s. The ratio to dense on our kernels "
        "is what sparsity gives; the one to transformers also holds faster kernels."
    ) in text
    assert '<b class="good">1.50x, faster</b><span>decode speed beside dense on our kernels</span>' in page
    found = [[" ".join(cell) for cell in row] for row in rows(page) if len(row) == 7 and "beside" in str(row)]
    assert [row[:4] for row in found] == [
        [
            "wanda-50 beside dense in transformers",
            "9.12 [8.80-9.40]",
            "23.7 [23.0-24.1]",
            "2.60x, faster [2.50x-2.70x]",
        ],
        ["beside dense on our kernels", "15.8 [15.5-16.0]", "23.7 [23.0-24.1]", "1.50x, faster [1.40x-1.60x]"],
    ]
    assert "wanda-50, dense on our kernels: 15.8 [15.5-16.0]; wanda-50, sparse: 23.7 [23.0-24.1]" in page
    assert "2.60x and 1.50x" in text


def test_a_larger_model_is_told_with_its_speed_or_why_it_was_not_timed(on_engine):
    speed = on_engine.candidates[0].speed
    larger = LargerModel(350_000_000, 0.5, 700_000_000, 420_000_000, speed)
    text = Page(render_html(replace(on_engine, larger=larger))).text
    assert "Qwen/Qwen2.5-0.5B is too small to gain from zeros: its 988.1 MB of weights" in text
    assert "A Llama of 350.0 million random weights, 50.0 % of those of its blocks zero" in text
    assert "420.0 MB instead of 700.0 MB in memory" in text
    skipped = replace(larger, speed=None, skipped="1.0 GB of memory is available, 4.0 GB is needed")
    text = Page(render_html(replace(on_engine, larger=skipped))).text
    assert "No larger model was timed: 1.0 GB of memory is available, 4.0 GB is needed." in text
    assert "larger model" not in Page(render_html(on_engine)).text


def test_the_stages_of_a_run_of_several_are_listed_and_the_run_is_not_called_pruning(kinds):
    text = Page(render_html(kinds["all"])).text
    assert "3 stages, one after the other: wanda, 50%; 25 % of the channels; thresholds, 40 %. The run took" in text
    assert "stage" not in Page(render_html(kinds["nothing"])).text.partition("Recipe")[0]
    assert "prun" not in Page(render_html(kinds["skipping"])).text.partition("Recipe")[0]
