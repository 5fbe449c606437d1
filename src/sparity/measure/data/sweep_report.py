"""A sweep's table: plain data that becomes JSON, CSV, a terminal table and a page. `docs/sweep.md` describes it."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile
from sparity.files import read_json_object
from sparity.measure.data.plain import plain
from sparity.measure.data.read_back import read_back
from sparity.measure.data.report import Quality, Report, Verdict

FORMAT = 2
# The columns of the CSV after one column per axis; no axis may have one of these names.
COLUMNS = (
    "status", "dense_model", "sparse_model", "target", "realised_sparsity", "model_sparsity", "parameters_left",
    "skipped", "text", "window", "tokens", "dense_perplexity", "perplexity", "change", "kl", "top1", "decode_ratio",
    "seconds", "peak_memory", "accepted", "message",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a text that begins so for a formula


@dataclass(frozen=True)
class Axis:
    """One thing that is varied. `numbers` are the labels' values when all of them are numbers."""

    name: str
    labels: tuple[str, ...]
    numbers: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One combination: what was measured, or the message with which it failed."""

    labels: tuple[str, ...]  # one per axis
    recipe: dict[str, Any]
    message: str | None = None
    model: str = ""
    method: str = ""
    target: float | None = None
    sparsity: float | None = None  # zeros that were realised, as in the report's candidate
    model_sparsity: float | None = None  # the same over all parameters
    parameters_left: float | None = None  # as a share of the dense model's; None where no shape changed
    skipped: float | None = None  # the share of input channels skipped at run time; None where none are
    quality: tuple[Quality, ...] = ()
    decode_ratio: float | None = None
    verdicts: tuple[Verdict, ...] = ()
    seconds: float | None = None
    peak_memory: int | None = None

    @classmethod
    def of(cls, labels: tuple[str, ...], recipe: dict[str, Any], report: Report) -> "Row":
        """The row of a finished run."""
        candidate = report.candidates[0]
        return cls(
            labels=labels,
            recipe=recipe,
            model=report.model,
            method=candidate.name,
            target=candidate.target,
            sparsity=candidate.sparsity,
            model_sparsity=candidate.model_sparsity,
            parameters_left=report.left(candidate),
            skipped=candidate.totals.skipped,
            quality=candidate.quality,
            decode_ratio=candidate.speed.decode_ratio.median if candidate.speed else None,
            verdicts=candidate.verdicts,
            seconds=candidate.effort.seconds,
            peak_memory=candidate.effort.peak_memory,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> "Row":
        """The row that `to_dict` wrote; `where` names the file in messages."""
        try:
            known = {**content, "labels": tuple(content["labels"])}
            known["quality"] = tuple(Quality(**_with_numbers(item, Quality)) for item in content["quality"])
            known["verdicts"] = tuple(Verdict(**item) for item in content["verdicts"])
            return cls(**known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{where} is damaged ({error}): start again with --force") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists; numbers that are not finite become their names as text."""
        content: dict[str, Any] = plain(dataclasses.asdict(self))
        return content

    @property
    def failed(self) -> bool:
        """Whether the combination ended with an error."""
        return self.message is not None

    @property
    def accepted(self) -> bool:
        """Whether every limit of the recipe's `accept` section was kept."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def words(self) -> str:
        """The labels in one line."""
        return ", ".join(self.labels)


@dataclass(frozen=True)
class SweepReport:
    """Every combination of the axes, in the order of the cross product: the last axis changes fastest."""

    base: dict[str, Any]
    axes: tuple[Axis, ...]
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> "SweepReport":
        """The report that a finished sweep left in `sweep.json`.

        Raises:
            CorruptFile: it is damaged.
        """
        content = read_json_object(path)
        try:
            rows = [{**row, "labels": list(row["labels"].values())} for row in content["rows"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{path} is damaged ({error})") from error
        found = read_back(cls, {**content, "rows": []}, path)
        return dataclasses.replace(found, rows=tuple(Row.from_dict(row, str(path)) for row in rows))

    @property
    def failed(self) -> tuple[Row, ...]:
        """The combinations that ended with an error."""
        return tuple(row for row in self.rows if row.failed)

    @property
    def texts(self) -> tuple[tuple[str, int], ...]:
        """Every text and window that was measured."""
        return tuple(dict.fromkeys((item.text, item.window) for row in self.rows for item in row.quality))

    def heads(self) -> tuple[str, ...]:
        """What tables call the axes: the last part of a key where that is enough to tell them apart."""
        short = [axis.name.rpartition(".")[2] for axis in self.axes]
        return tuple(name if short.count(name) == 1 else axis.name for axis, name in zip(self.axes, short, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, with the labels of a row by the name of their axis."""
        names = [axis.name for axis in self.axes]
        rows = [{**row.to_dict(), "labels": dict(zip(names, row.labels, strict=True))} for row in self.rows]
        content: dict[str, Any] = plain(dataclasses.asdict(dataclasses.replace(self, rows=())))
        return {**content, "rows": rows}

    def to_csv(self) -> str:
        """One line per combination and text, as in RFC 4180; a failed combination has one line with its message."""
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow([_safe(name) for name in (*(axis.name for axis in self.axes), *COLUMNS)])
        writer.writerows([_safe(cell) for cell in line] for row in self.rows for line in _lines(row))
        return buffer.getvalue()


def quality_of(row: Row, text: tuple[str, int]) -> Quality | None:
    """What a row measured on a text and window."""
    return next((item for item in row.quality if (item.text, item.window) == text), None)


def _lines(row: Row) -> Iterator[list[Any]]:
    for item in row.quality or (None,):
        cells = {
            "status": "failed" if row.failed else "done",
            "dense_model": row.model,
            "sparse_model": row.method,
            "target": row.target,
            "realised_sparsity": row.sparsity,
            "model_sparsity": row.model_sparsity,
            "parameters_left": row.parameters_left,
            "skipped": row.skipped,
            "decode_ratio": row.decode_ratio,
            "seconds": row.seconds,
            "peak_memory": row.peak_memory,
            "accepted": "" if row.failed or not row.verdicts else "yes" if row.accepted else "no",
            "message": row.message,
            **(dataclasses.asdict(item) if item else {}),
        }
        yield [*row.labels, *(cells.get(column) for column in COLUMNS)]


def _safe(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such a text gets an apostrophe in front, numbers stay."""
    if not isinstance(cell, str) or not cell.startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _with_numbers(content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The fields of a dataclass read from JSON, in which a number that is not finite is its name."""
    numbers = {field.name for field in dataclasses.fields(kind) if field.type is float}
    return {key: float(value) if key in numbers else value for key, value in content.items()}
