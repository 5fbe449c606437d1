"""What the page tells of every kind of change: heat maps, tiles, tables, plots."""

import re
from dataclasses import replace

import pytest
import yaml

from pages import rows
from sparity.measure.show.page_run import render_html


def test_heat_maps_average_projections_of_one_role_by_their_size(report):
    change = report.candidates[0].changes[0]
    small, large = (
        replace(change, name=name, shape_before=(2, columns), shape_after=(2, columns), zeros=zeros)
        for name, columns, zeros in (("a", 10, 0.2), ("b", 30, 0.6))
    )
    page = render_html(replace(report, candidates=(replace(report.candidates[0], changes=(small, large)),)))
    assert "<title>block 0, q: 50.0 %</title>" in page


def test_heat_maps_show_sparsity_and_loss(report):
    page = render_html(report)
    assert page.count("<title>block 1, down: 50.0 %</title>") == 1
    assert page.count("<title>block 1, down: 7.1 %</title>") == 1


CAPTIONS = (
    "Zeros by block and role",
    "What is left of each projection&#x27;s size",
    "Input channels that are skipped at run time",
    "Share of the output&#x27;s energy on calibration text that was lost",
)


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        ("pruned", (1, 0, 0, 0)),
        ("cut", (0, 1, 0, 1)),
        ("skipping", (0, 0, 1, 0)),
        ("quantised", (0, 0, 0, 0)),
        ("healed", (0, 0, 0, 1)),
        ("nothing", (0, 0, 0, 0)),
        ("all", (1, 1, 1, 1)),
    ],
)
def test_a_heat_map_is_drawn_for_every_kind_of_change_and_for_no_other(kinds, kind, drawn):
    page = render_html(kinds[kind])
    assert tuple(page.count(f"<figcaption>{caption}</figcaption>") for caption in CAPTIONS) == drawn


def test_heat_maps_of_what_is_left_and_what_is_skipped_have_the_values(kinds):
    page = render_html(kinds["all"])
    assert page.count("<title>block 1, down: 75.0 %</title>") == 1  # 24 of 32 weights
    assert page.count("<title>block 1, q: 100.0 %</title>") == 1  # not cut, but skipped and pruned
    assert page.count("<title>block 1, down: 45.0 %</title>") == 1
    assert page.count("<title>block 1, down: 12.5 %</title>") == 1  # the loss


def test_the_loss_of_several_stages_has_a_map_for_each(kinds):
    candidate = kinds["all"].candidates[0]
    lossy = tuple(replace(change, loss=0.25) if change.stage == "prune" else change for change in candidate.changes)
    page = render_html(replace(kinds["all"], candidates=(replace(candidate, changes=lossy),)))
    assert f"<figcaption>{CAPTIONS[3]} by prune</figcaption>" in page
    assert f"<figcaption>{CAPTIONS[3]} by structure</figcaption>" in page
    assert "<td>25.0 %<br>12.5 %<br>-</td>" in page


@pytest.mark.parametrize(
    ("kind", "tiles"),
    [
        ("pruned", ["50.0 % of the weights in 8 projections are zero"]),
        ("cut", ["88.0 % of the parameters are left"]),
        ("skipping", ["41.0 % of the input channels are skipped at run time"]),
        ("quantised", ["4.57 bits per stored weight"]),
        ("nothing", []),
        (
            "all",
            [
                "50.0 % of the weights in 8 projections are zero",
                "88.0 % of the parameters are left",
                "40.6 % of the input channels are skipped at run time",
            ],
        ),
    ],
)
def test_a_tile_for_every_kind_of_change(kinds, kind, tiles):
    found = re.findall(r'<div class="tile"><b class="">(.*?)</b><span>(.*?)</span>', render_html(kinds[kind]))
    assert [" ".join(tile) for tile in found if "weight files" not in tile[1]] == tiles


def test_projections_and_recipe_lie_in_details(report):
    page = render_html(report)
    projections, recipe = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", page, re.DOTALL)
    assert projections[0] == "168 projections"
    assert projections[1].count("<tr>") == 169
    assert [row for row in rows(projections[1]) if row[0] in (["projection"], ["model.layers.1.mlp.down_proj"])] == [
        [[head] for head in ("projection", "stages", "role", "block", "shape", "zeros", "target", "loss")],
        [
            ["model.layers.1.mlp.down_proj"],
            ["prune"],
            ["down"],
            ["1"],
            ["896", "x", "4,864"],
            ["50.0", "%"],
            ["50.0", "%"],
            ["7.1", "%"],
        ],
    ]
    assert recipe[0] == "Recipe"
    assert yaml.safe_load(recipe[1].removeprefix("<pre>").removesuffix("</pre>")) == report.candidates[0].recipe


def projections(page):
    """The cells of the table of projections, by name, and its heads."""
    table = re.search(r"<details><summary>\d+ projections?</summary>(.*?)</details>", page, re.DOTALL).group(1)
    heads, *found = [[" ".join(cell) for cell in row] for row in rows(table)]
    return heads, {row[0]: row[1:] for row in found}


def test_a_projection_has_one_row_for_all_stages_that_touched_it(kinds):
    heads, found = projections(render_html(kinds["all"]))
    assert heads == ["projection", "stages", "role", "block", "shape", "zeros", "target", "skipped", "loss"]
    assert len(found) == 8
    assert found["model.layers.1.mlp.down_proj"] == [
        "prune structure activations",
        "down",
        "1",
        "4 x 8 → 4 x 6",
        "50.0 %",
        "50.0 % 25.0 % 40.0 %",
        "45.0 %",
        "- 12.5 % -",
    ]
    query = ["prune activations", "q", "0", "4 x 4", "50.0 %", "50.0 % 40.0 %", "35.0 %", ""]
    assert found["model.layers.0.self_attn.q_proj"] == query


def test_a_table_of_projections_has_only_columns_with_something_in_them(kinds):
    heads, found = projections(render_html(kinds["quantised"]))
    assert heads == ["projection", "stages", "role", "block", "shape", "zeros", "bits"]
    assert found["model.layers.0.self_attn.q_proj"] == ["quantise", "q", "0", "4 x 4", "0.0 %", "8"]
    assert "projections</summary>" not in render_html(kinds["nothing"])


def test_the_size_table_has_a_column_for_every_kind_of_change(every_kind, kinds):
    found = [[" ".join(cell) for cell in row] for row in rows(render_html(every_kind))]
    sizes = {row[0]: row[1:6] for row in found[: 2 + len(every_kind.candidates)]}
    left, skipped = "352 88.0 %", "target 40.0 %"
    assert sizes == {
        "model": [
            "zeros in projections",
            "zeros of all parameters",
            "parameters left",
            "bits per weight",
            "channels skipped at run time",
        ],
        "dense": ["0.0 %", "0.0 %", "400", "", "0.0 %"],
        "pruned": ["50.0 % target 50.0 %", "28.0 %", "", "", ""],
        "cut": ["", "", left, "", ""],
        "skipping": ["", "", "", "", f"41.0 % {skipped}"],
        "quantised": ["", "", "", "4.57 bits", ""],
        "healed": [""] * 5,
        "nothing": [""] * 5,
        "all": [
            "50.0 % target 50.0 %",
            "25.0 %",
            left,
            "",
            f"40.6 % {skipped}",
        ],
    }
    heads = [" ".join(cell) for cell in rows(render_html(kinds["nothing"]))[0]]
    assert heads == ["model", "weight files", "time of the run", "peak memory", "calibration tokens"]


def test_quality_is_drawn_against_zeros_where_there_is_nothing_else(kinds):
    page = render_html(kinds["pruned"])
    assert "<h2>Quality against sparsity</h2>" in page
    assert "<title>pruned: realised sparsity 50.0 %, perplexity +16.2 %</title>" in page


def test_quality_is_drawn_against_all_that_a_token_does_without_where_weights_are_cut_or_skipped(every_kind):
    page = render_html(every_kind)
    assert "<h2>Quality against weights spared</h2><p>Weights spared per token, of all parameters" in page
    shares = re.findall(r"<title>([\w ]+: weights spared per token [\d.]+ %), perplexity", page)
    # pruned 112 of 400; cut 48; skipping (5.6 + 2 * 12.8 + 14.4) * 2; all as in the test of outcomes
    assert shares == [
        "dense: weights spared per token 0.0 %",
        "pruned: weights spared per token 28.0 %",
        "cut: weights spared per token 12.0 %",
        "skipping: weights spared per token 22.8 %",
        "quantised: weights spared per token 0.0 %",
        "healed: weights spared per token 0.0 %",
        "nothing: weights spared per token 0.0 %",
        "all: weights spared per token 42.9 %",
    ]
