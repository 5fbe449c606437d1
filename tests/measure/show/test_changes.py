"""Every kind of change in words, table, card and page: zeros, shapes, bits, run-time skipping, several, none."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from pages import Page, rows
from sparity.measure.show.card import model_card
from sparity.measure.show.page_run import render_html
from sparity.measure.show.sentences import average_cells, describe_changes, describe_effort
from sparity.measure.show.table import print_report
from sparity.stages import Change
from sparity.stages.change import outcomes

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
CUT = (
    Change("channels", UP, "up", 0, (8, 4), (6, 4), zeros=0.0),
    Change("channels", DOWN, "down", 0, (4, 8), (4, 6), zeros=0.0),
)
SKIPPED = (
    Change("activations", UP, "up", 0, (8, 4), (8, 4), zeros=0.0, target=0.4, skipped=0.375),
    Change("activations", DOWN, "down", 0, (4, 8), (4, 8), zeros=0.0, target=0.4, skipped=0.425),
)
EVERYTHING = (
    *CUT,
    Change("prune", UP, "up", 0, (6, 4), (6, 4), zeros=0.5, target=0.5),
    Change("prune", DOWN, "down", 0, (4, 6), (4, 6), zeros=0.5, target=0.5),
    Change("activations", UP, "up", 0, (6, 4), (6, 4), zeros=0.5, target=0.4, skipped=0.4),
)


@pytest.fixture
def of(report):
    """A candidate with the given changes."""

    def build(changes, stages, parameters=494_032_768, sparsity=0.0, target=None, **others):
        known = {"model_sparsity": sparsity / 2, "recipe": {"stages": []}, **others}
        return replace(
            report.candidates[0], changes=tuple(changes), stages=stages, parameters=parameters, sparsity=sparsity,
            target=target, **known,
        )  # fmt: skip

    return build


@pytest.fixture
def four(report, of):
    """One of each kind."""
    return replace(
        report,
        blocks=1,
        candidates=(
            replace(report.candidates[0], name="pruned"),
            of(CUT, ("channels, 25 %",), 400_000_000, name="cut"),
            of(SKIPPED, ("activations, 40 %",), name="skipping"),
            of(EVERYTHING, ("channels", "prune", "activations"), 400_000_000, 0.5, 0.5, name="all three"),
        ),
    )


def test_what_became_of_a_projection_over_all_stages():
    up, down = outcomes(EVERYTHING)
    assert (up.stages, down.stages) == (("channels", "prune", "activations"), ("channels", "prune"))
    assert (up.shape_before, up.shape_after, up.zeros, up.target) == ((8, 4), (6, 4), 0.5, 0.5)
    assert (up.skipped, up.skip_target, down.skipped) == (0.4, 0.4, None)
    assert up.read == pytest.approx(24 / 32 * 0.5 * 0.6)
    assert down.read == pytest.approx(24 / 32 * 0.5)


def test_sentences(of):
    assert describe_changes(of((), ("revive",))) == "No weight was changed."
    assert describe_changes(of(CUT, ("channels",), 400_000_000)) == (
        "2 projections are smaller: 75.0 % of their weights are left; the model has 400.0 million parameters."
    )
    assert describe_changes(of(CUT[:1], ("channels",), 1000)) == (
        "1 projection is smaller: 75.0 % of their weights are left; the model has 1,000 parameters."
    )
    assert describe_changes(of(SKIPPED, ("activations",))) == (
        "40.0 % of the input channels of 2 projections are skipped at run time (target 40.0 %), measured on "
        "calibration text."
    )
    bits = [replace(change, stage="quantize", bits=width) for change, width in zip(CUT, (4.0, 8.0), strict=True)]
    bits = [replace(change, shape_before=change.shape_after) for change in bits]
    assert describe_changes(of(bits, ("quantize",))) == "2 projections are stored in 6 bits per weight."
    assert describe_changes(of(EVERYTHING, ("channels", "prune", "activations"), 400_000_000, 0.5, 0.5)) == (
        "50.0 % of the weights in 2 projections are zero (target 50.0 %), 25.0 % of all parameters. "
        "2 projections are smaller: 75.0 % of their weights are left; the model has 400.0 million parameters. "
        "40.0 % of the input channels of 1 projection are skipped at run time (target 40.0 %), measured on calibration "
        "text. Stages, in this order: channels; prune; activations."
    )
    assert describe_effort(of((), ("x",))).startswith("It took 12 min 05 s on 8 threads")


def test_shares_over_all_projections(of):
    assert of((), ()).read == 1
    assert of((), ()).skipped is None
    assert of(SKIPPED, ("activations",)).skipped == pytest.approx(0.4)
    assert of(CUT, ("channels",)).read == pytest.approx(0.75)
    left = average_cells(of(CUT, ("channels",)), "left")
    assert left == {(0, "up"): 0.75, (0, "down"): 0.75}
    assert average_cells(of(SKIPPED, ("activations",)), "skipped") == {(0, "up"): 0.375, (0, "down"): 0.425}


def printed(report, width):
    console = Console(file=StringIO(), width=width)
    print_report(report, console)
    return console.file.getvalue()


def test_the_table_has_what_is_left_and_skipped_under_the_zeros(four):
    text = printed(four, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    place = next(number for number, line in enumerate(lines) if line[:2] == ["all", "three"])
    assert lines[place][2:4] == ["50.0", "%"]
    assert lines[place + 1][:3] == ["81.0", "%", "left"]
    assert lines[place + 2][:3] == ["40.0", "%", "skip"]
    assert "left" not in printed(replace(four, candidates=four.candidates[:1]), 80).split("Weight files")[0]


def test_the_page_has_tiles_columns_maps_and_rows_of_each_kind(four):
    page = render_html(four)
    text = Page(page).text
    heads = next(row for row in rows(page) if "zeros" in " ".join(row[1]) if len(row) > 1)
    assert [" ".join(cell) for cell in heads][:5] == [
        "model", "zeros in changed projections", "of all parameters", "parameters", "channels skipped",
    ]  # fmt: skip
    assert text.count("Share of the dense model's weights that is left") >= 2
    assert "weights not read for a token: zero, gone or skipped" in text
    assert "8 x 4 → 6 x 4" in text
    table = next(part for part in page.split("<details>") if "2 changed projections" in part and "activations" in part)
    assert "channels, prune, activations" in page
    assert "skipped" in table
    alone = render_html(replace(four, candidates=four.candidates[2:3]))
    assert '<b class="">40.0 %</b><span>of the input channels are skipped at run time</span>' in alone
    assert "are zero" not in alone
    assert "Realised sparsity by block and role" not in alone
    pruned = render_html(replace(four, candidates=four.candidates[:1]))
    assert "parameters</th>" not in pruned.split("Quality")[0].replace("of all parameters</th>", "")
    assert "realised sparsity" in pruned


def test_a_run_that_changed_nothing_is_a_normal_report(report, of):
    nothing = replace(report, candidates=(of((), ("revive",), name="nothing"),))
    page = Page(render_html(nothing))
    assert "No weight was changed." in page.text
    assert "0.0 %" in printed(nothing, 100)
    assert "# Qwen/Qwen2.5-0.5B, unchanged\n" in model_card(nothing, nothing.candidates[0])


def test_cards_name_what_was_done_and_how_to_load_it(four):
    cut, skipping, everything = (model_card(four, candidate) for candidate in four.candidates[1:])
    assert "# Qwen/Qwen2.5-0.5B, 400.0 million parameters\n" in cut
    assert "`kept_indices.json` says which units of the dense model are left." in cut
    assert "- structured-pruning" in cut
    assert "import sparity" not in cut
    assert "# Qwen/Qwen2.5-0.5B, 40.0 % of inputs skipped\n" in skipping
    assert "import sparity  # attaches what is skipped at run time" in skipping
    assert "sparity.load(name, runtime=False)" in skipping
    assert "kept_indices" not in skipping
    assert "# Qwen/Qwen2.5-0.5B, 50.0 % sparse, 400.0 million parameters, 40.0 % of inputs skipped\n" in everything
    packed = replace(four.candidates[3], recipe={"output": {"format": "packed"}})
    assert "import sparity  # reads the packed weights, attaches what is skipped" in model_card(four, packed)
