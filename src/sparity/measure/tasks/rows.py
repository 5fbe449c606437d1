"""The rows of the local task files, as the harness asks for them; each function is named in `files/*.yaml`."""

import json
import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset

from sparity.errors import CorruptFile, InvalidInput
from sparity.measure.tasks.long_context import BORDER, generated
from sparity.measure.tasks.planning import VARIABLE
from sparity.models.loading import load_tokenizer

Split = dict[str, Dataset]


def found_file(file: str, data: str | None) -> Path:
    """A task's file below the folder of task files.

    Raises:
        InvalidInput: no folder was named, or it has no such file.
    """
    folder = data or os.environ.get(VARIABLE)
    if not folder:
        raise InvalidInput(f"the task reads {file}: name the folder that holds it with --data FOLDER or {VARIABLE}")
    path = Path(folder) / file
    if not path.is_file():
        raise InvalidInput(f"{folder} has no {file}: the folder of task files is another one")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Raises:
        CorruptFile: a line that is none.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise CorruptFile(f"{path} is no file of JSON lines ({error})") from error


def read(file: str, data: str | None = None, **_: Any) -> Split:
    """Rows as they are."""
    return {"test": Dataset.from_list(lines(found_file(file, data)))}


def boolq(file: str, data: str | None = None, **_: Any) -> Split:
    """Passage and question apart from the words that stand before them in the file."""
    rows = []
    for row in lines(found_file(file, data)):
        passage, _mark, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        rows.append({"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]})
    return {"test": Dataset.from_list(rows)}


def hellaswag(file: str, data: str | None = None, **_: Any) -> Split:
    """Pairs of lines, the right and a wrong end of one beginning: what both share is the context."""
    path = found_file(file, data)
    wrong_path = path.with_name(path.name.replace("correct", "wrong"))
    rows = []
    for right, wrong in zip(_lines_of(path), _lines_of(wrong_path), strict=True):
        context = " ".join(_shared(right.split(" ")[:-1], wrong.split(" ")[:-1]))
        rows.append({"query": context, "choices": [text[len(context) + 1 :] for text in (right, wrong)], "gold": 0})
    return {"test": Dataset.from_list([row for row in rows if row["query"]])}


def _shared(first: list[str], second: list[str]) -> list[str]:
    """The words that two texts begin with."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def _lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def mmlu(file: str, data: str | None = None, **_: Any) -> Split:
    """Prompts that hold their five examples."""
    rows = json.loads(found_file(file, data).read_text(encoding="utf-8"))["samples"]
    return {"test": Dataset.from_list([{"query": row["prompt"], "gold": row["input_label"]} for row in rows])}


def gsm8k(file: str, data: str | None = None, **_: Any) -> Split:
    """Test and train, from which the examples of a prompt are drawn."""
    path = found_file(file, data)
    return {name: Dataset.from_list(lines(path.with_name(f"{name}.jsonl"))) for name in ("test", "train")}


def long_context(
    kind: str,
    later: bool = False,
    tokenizer: str | None = None,
    path: str | None = None,
    context: int = 512,
    items: int = 100,
    seed: int = 0,
    **_: Any,
) -> Split:
    """Generated questions; with `later` the model reads the question after the text may have been evicted."""
    name = tokenizer or path
    words = load_tokenizer(name) if name else None
    if words is None:
        raise InvalidInput(f"{kind}: the length is counted in tokens, so a model with a tokenizer is needed")
    encode: Callable[[str], Any] = lambda text: words(text, verbose=False)["input_ids"]  # noqa: E731
    rows = []
    for item in generated(kind, encode, context, items, seed):
        text = f"{item.context}{BORDER}\n\n{item.question}" if later else item.text
        rows.append({"query": text, "choices": list(item.choices), "gold": item.gold})
    return {"test": Dataset.from_list(rows)}
