"""Tasks on a page: what two models got for the same items."""

from collections.abc import Sequence

from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.show.page import table
from sparity.measure.show.sentences_tasks import PAIRED, change_words, verdict_words
from sparity.visible import escape

HEADS = ("task", "metric", "items", "dense", "sparse", "change", "lost/won", "p", "what the sample says")


def task_table(found: Sequence[TaskComparison], heads: Sequence[str] = HEADS) -> str:
    """A row per task; empty without any."""
    rows = []
    for one in found:
        share = one.drop is not None
        kind = "" if not one.differs else "good" if one.change > 0 else "bad"
        rows.append(
            [
                f"{escape(one.name)}<small>{escape(one.source)}</small>",
                escape(one.metric),
                f"{one.items:,}",
                *(f"{value * 100:.1f} %" if share else f"{value:.3f}" for value in (one.first, one.second)),
                f'<span class="{kind}">{escape(change_words(one))}</span>',
                f"{one.lost}/{one.won}" if share else "",
                f"{one.p:.3f}" if share else "",
                escape(verdict_words(one)),
            ]
        )
    return f'{table(heads, rows)}<p class="faint">{escape(PAIRED)}</p>' if rows else ""
