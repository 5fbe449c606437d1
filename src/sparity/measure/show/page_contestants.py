"""The end of the demo's page: quality against speed, and what each model answers."""

from sparity.measure.charts.tradeoff import dominated, tradeoff
from sparity.measure.data.report import Report
from sparity.measure.show import numbers
from sparity.measure.show.page import figure
from sparity.measure.show.sentences import describe_answer
from sparity.visible import escape


def contestants_section(report: Report) -> str:
    """The picture and the answers, or nothing where no models were timed together."""
    if not report.contestants:
        return ""
    drawn = tradeoff("Quality against speed", report.contestants)
    parts = [figure("Perplexity against decode speed: the best are at the lower right", drawn)]
    sizes = "; ".join(f"{one.name} {numbers.size(one.weight_bytes)}" for one in report.contestants)
    ours = "All of ours run" if any(one.kind == "peer" for one in report.contestants) else "All run"
    parts.append(
        f"<p>{ours} in bfloat16, in turns; perplexity in {report.dtype}. Weights in memory: {escape(sizes)}.</p>"
    )
    beaten = dominated(report.contestants)
    if beaten:
        said = "; ".join(f"{name} by {winner}" for name, winner in beaten.items())
        parts.append(f"<p>Beaten in both, hollow in the picture: {escape(said)}.</p>")
    for prompt in dict.fromkeys(prompt for one in report.contestants for prompt in one.answers):
        rows = "".join(
            f"<li><b>{escape(one.name)}:</b> {escape(describe_answer(one.answers[prompt]))}</li>"
            for one in report.contestants
            if prompt in one.answers
        )
        parts.append(f"<h3>{escape(prompt)}</h3><ul>{rows}</ul>")
    return f"<section><h2>Quality against speed</h2>{''.join(parts)}</section>"
