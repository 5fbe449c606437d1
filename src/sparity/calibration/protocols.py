"""The texts that papers measure perplexity on, in the forms in which their code reads them.

A perplexity without its protocol means little: the same test set joined in another way, or its tokenised form with
`<unk>`, gives another number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparity.calibration.text import read_documents
from sparity.errors import InvalidInput
from sparity.files import expand

PLAIN = (".txt", ".raw", ".tokens")


@dataclass(frozen=True)
class Protocol:
    """Which rows of which data set, and how they become one text.

    Attributes:
        words: what it is and whose code reads it so.
        source: the data set, its configuration and its split on the hub.
        field: the column that holds the text.
        join: what stands between two rows.
        rows: only the first so many; None = all.
        windows: only the first so many windows; None = all that are full.
        files: of the data set, where only some are read.
        newline: whether a row keeps the end of its line, as WikiText's do.
    """

    words: str
    source: tuple[str, str | None, str]
    field: str
    join: str
    rows: int | None = None
    windows: int | None = None
    files: str | None = None
    newline: bool = False


PROTOCOLS = {
    "wikitext2": Protocol(
        "WikiText-2, raw test split, rows joined by a blank line (GPTQ, SparseGPT, Wanda)",
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        "text",
        "\n\n",
        newline=True,
    ),
    "c4": Protocol(
        "C4, the first 1,100 documents of the first validation file joined by a space, 256 windows (SparseGPT, Wanda)",
        ("allenai/c4", None, "validation"),
        "text",
        " ",
        rows=1100,
        windows=256,
        files="en/c4-validation.00000-of-00008.json.gz",
    ),
    "ptb": Protocol(
        "Penn Treebank, test split, sentences joined by a space (SparseGPT)",
        ("ptb-text-only/ptb_text_only", None, "test"),
        "sentence",
        " ",
    ),
    "ptb-gptq": Protocol(
        "Penn Treebank, validation split, sentences joined by a blank line (GPTQ)",
        ("ptb-text-only/ptb_text_only", None, "validation"),
        "sentence",
        "\n\n",
    ),
}


def protocol_text(name: str, file: str | None = None) -> str:
    """The one text of a protocol.

    Args:
        name: of `PROTOCOLS`.
        file: the rows of the split: a text file with a row per line, or JSON lines and others with the protocol's
            column; None = the data set itself.

    Raises:
        InvalidInput: no such protocol, no such file, or the tokenised form of WikiText.
    """
    if name not in PROTOCOLS:
        raise InvalidInput(f"protocol {name!r}: one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    rows = list(_rows(protocol, name, file))[: protocol.rows]
    if not any(row.strip() for row in rows):
        raise InvalidInput(f"{file or protocol.source[0]} holds no text")
    return protocol.join.join(rows)


def _rows(protocol: Protocol, name: str, file: str | None) -> Sequence[str]:
    if file is None:
        return [str(row[protocol.field]) for row in _downloaded(protocol)]
    path = Path(expand(file))
    if path.suffix not in PLAIN:
        if protocol.newline:
            raise InvalidInput(f"{file}: {name} needs the text file itself (wiki.test.raw), whose blank lines count")
        return read_documents(file, protocol.field)
    if not path.is_file():
        raise InvalidInput(f"text file {file} does not exist")
    with path.open(encoding="utf-8", newline="\n") as lines:  # other characters that end lines are part of the text
        read = list(lines)
    if protocol.newline:
        if any("<unk>" in line for line in read):
            raise InvalidInput(f"{file} is WikiText's tokenised form (<unk>): {name} is measured on the raw one")
        return [line if line.strip() else "" for line in read]
    return [line.strip() for line in read]


def _downloaded(protocol: Protocol) -> Any:
    """The rows of a data set, by the `datasets` package."""
    name, config, split = protocol.source
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidInput(
            f"{name} is read by the datasets package: pip install 'sparity[data]', or give the split as a file"
        ) from error
    files = {} if protocol.files is None else {"data_files": {split: protocol.files}}
    try:
        return load_dataset(name, config, split=split, **files)
    except Exception as error:  # datasets raises errors of a dozen libraries
        raise InvalidInput(f"{name} cannot be had ({error}): give the split as a file") from error
