"""A small corpus of four domains, cut from Python's own documentation: no change of this repository changes it."""

import io
import tarfile
from pydoc_data import topics

import pytest
from tokenizers import Tokenizer

import zoo_data
from sparity import zoo

TOPICS = [text for _, text in sorted(topics.topics.items()) if len(text) > 1000]
SOURCES = {domain: TOPICS[place::4] for place, domain in enumerate(zoo_data.MIX)}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """`{domain}.tar.xz` of train, valid and test, as the real corpus has them; every fifth document is held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, documents in SOURCES.items():
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
