"""Documents from files, lists and data sets."""

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sparity.calibration.bundled import bundled_documents, is_bundled
from sparity.calibration.text_files import SUFFIXES, read_rows
from sparity.errors import InvalidInput, suggestion
from sparity.files import expand

FIELDS_SHOWN = 20  # in a message


def read_documents(text: str | Sequence[str], field: str = "text", chat_tokenizer: Any = None) -> list[str]:
    """The documents of a text source.

    Args:
        text: a text file (one document), JSON lines under any of their names, a `.json` or `.parquet` file (a document
            per row), each also compressed with gzip or zstd, a list of documents, the name of a data set as
            `name[:split]` (a local folder works as a name), or a text that Python brings along:
            `python-docs:calibration`, `python-docs:held-out`, `python-code:...`.
        field: the column that holds the document, or the list of messages when `chat_tokenizer` is given.
        chat_tokenizer: a tokenizer whose chat template turns each row's messages into a document.

    Raises:
        InvalidInput: nothing there, an unknown field, or no text in it.
        CorruptFile: a file that is not what its name says.
    """
    if isinstance(text, str):
        rows, where = _read_source(text), text
    else:
        rows, where = list(text), "the given list"
    documents = [_document(row, index, field, chat_tokenizer, where) for index, row in enumerate(rows)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InvalidInput(f"{where} holds no text")
    return documents


def _read_source(text: str) -> list[Any]:
    if is_bundled(text):
        return list(bundled_documents(text))
    if not text.strip():
        raise InvalidInput("the name of the text is empty: give a file, a data set name or a list of texts")
    path = expand(text)  # os.path.isfile, unlike Path.is_file, is False for a name that no file can have
    return read_rows(path) if os.path.isfile(path) else _read_dataset(text)


def _document(row: Any, index: int, field: str, chat_tokenizer: Any, where: str) -> str:
    if isinstance(row, dict):
        if field not in row:
            raise InvalidInput(
                f'{where}, row {index}: no field "{field}"{suggestion(field, row)} (fields: {_few(row)})'
            )
        row = row[field]
    if chat_tokenizer is not None:
        if not isinstance(row, list):
            raise InvalidInput(
                f'{where}, row {index}: "{field}" is not a list of messages, which a chat template needs'
            )
        if not getattr(chat_tokenizer, "chat_template", None):
            raise InvalidInput("this model's tokenizer has no chat template: leave `chat` out")
        try:
            return str(chat_tokenizer.apply_chat_template(row, tokenize=False))
        except Exception as error:  # a template is a program of the model's author
            raise InvalidInput(f"{where}, row {index}: the chat template refuses its messages: {error}") from error
    if not isinstance(row, str):
        raise InvalidInput(f"{where}, row {index}: expected text, got {type(row).__name__}")
    try:
        row.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{where}, row {index}: no valid text, half a surrogate pair at character {error.start}"
        ) from error
    return row


def _few(fields: Iterable[str]) -> str:
    names = list(islice(fields, FIELDS_SHOWN + 1))
    return ", ".join(names[:FIELDS_SHOWN]) + (", ..." if len(names) > FIELDS_SHOWN else "")


def _read_dataset(text: str) -> list[Any]:
    name, _, split = text.partition(":")
    looks_like_file = Path(name).suffix in SUFFIXES
    if looks_like_file and not os.path.exists(name):
        raise InvalidInput(f"text file {name} does not exist")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidInput(
            f"{name} is not a file, and reading data sets needs the datasets package: pip install 'sparity[data]'"
        ) from error
    try:
        return list(load_dataset(name, split=split or "train"))
    except Exception as error:  # datasets raises errors of a dozen libraries
        raise InvalidInput(f"no text file and no data set {text!r} can be read: {error}") from error
