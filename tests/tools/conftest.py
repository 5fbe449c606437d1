"""A small corpus of four domains, cut from this repository's own documents and sources."""

import io
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import zoo_data
from sparity import zoo

ROOT = Path(__file__).parents[2]
SOURCES = {
    "books": "docs/methods/*.md",
    "web": "docs/*.md",
    "code": "src/sparity/static/**/*.py",
    "math": "tests/engine/**/*.py",
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """`{domain}.tar.xz` of train, valid and test, as the real corpus has them; every fifth document is held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, pattern in SOURCES.items():
        documents = [path.read_text() for path in sorted(ROOT.glob(pattern)) if path.stat().st_size > 1000]
        held_out = documents[::5]
        with tarfile.open(folder / f"{domain}.tar.xz", "w:xz") as archive:
            for split, part in (
                ("train", [d for d in documents if d not in held_out]),
                ("valid", held_out),
                ("test", held_out),
            ):
                content = f"\n{zoo_data.SEPARATOR}\n".join(part).encode()
                member = tarfile.TarInfo(f"{domain}/{split}.txt")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The folder of the zoo's tokenizer."""
    return zoo.path("llama")


@pytest.fixture(scope="session")
def texts(corpus, tokenizer, tmp_path_factory):
    """The small corpus, tokenised."""
    folder = zoo_data.prepare(corpus, tokenizer, tmp_path_factory.mktemp("cache"), tokens=None)
    return zoo_data.Texts(folder, Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
