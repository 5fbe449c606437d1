"""Texts of the zoo: a corpus as token files, batches drawn from it, and sequences that ask for what was read before."""

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

MIX = {"books": 0.45, "web": 0.35, "code": 0.11, "math": 0.09}  # of the sequences that ask for no recall
SEPARATOR = "<|endoftext|>"
NAMES = """
    Ada Alan Anna Bela Boris Carla Cyrus Dana Diego Edith Elena Emil Farid Fiona Frank Grace Gustav Hanna Hugo Ida
    Igor Iris Jonas Julia Karl Kira Lars Leila Linus Lucy Marta Max Mina Moses Nadia Nils Nora Olga Omar Oscar Paula
    Pedro Petra Quinn Rahel Ralf Rosa Ruth Sara Silas Sonja Tamar Theo Tina Umar Ute Vera Victor Wanda Willy Xenia
    Yara Yusuf Zoe
""".split()  # noqa: SIM905 (a list would be 64 lines)
Ids = NDArray[np.int64]


def prepare(corpus: Path, tokenizer: Path, cache: Path, tokens: int | None, seed: int = 0) -> Path:
    """Tokenise `corpus` once, to `{domain}-{split}.u16` files, and give their folder.

    Of the training documents, a random subset is taken that holds each domain's share of `tokens` (None: all of them);
    held-out splits are whole. Every document ends with the separator. The folder's name tells its content, and it
    appears whole or not at all.
    """
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    wanted = {
        "sizes": {name: (corpus / f"{name}.tar.xz").stat().st_size for name in MIX},
        "mix": MIX,
        "tokens": tokens,
        "seed": seed,
    }
    wanted["tokenizer"] = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    folder = cache / f"tokens-{hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    for domain, share in MIX.items():
        with tarfile.open(corpus / f"{domain}.tar.xz") as archive:
            for member in (member for member in archive if member.isfile()):
                split = Path(member.name).stem
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file always has one
                documents = stream.read().decode().split(f"\n{SEPARATOR}\n")
                limit = None if tokens is None or split != "train" else int(tokens * share)
                if split == "train":
                    np.random.default_rng(seed).shuffle(documents)
                count = _write(encoder, documents, limit, partial / f"{domain}-{split}.u16")
                print(f"{domain} {split}: {count:,} tokens", flush=True)
    (partial / "made-from.json").write_text(json.dumps(wanted, indent=2))
    partial.rename(folder)
    return folder


def _write(encoder: Tokenizer, documents: list[str], limit: int | None, file: Path) -> int:
    end, count = encoder.token_to_id(SEPARATOR), 0
    with file.open("wb") as out:
        for start in range(0, len(documents), 64):
            if limit is not None and count >= limit:
                break
            for encoding in encoder.encode_batch(documents[start : start + 64]):
                out.write(np.array([*encoding.ids, end], dtype=np.uint16).tobytes())
                count += len(encoding.ids) + 1
    return count


@dataclass(frozen=True)
class Texts:
    """Token files of a folder made by `prepare`, and the tokenizer that made them."""

    folder: Path
    encoder: Tokenizer

    def tokens(self, domain: str, split: str) -> NDArray[np.uint16]:
        """All tokens of a domain's split, mapped from disk."""
        return np.memmap(self.folder / f"{domain}-{split}.u16", dtype=np.uint16, mode="r")

    def piece(self, drawn: np.random.Generator, domain: str, split: str, length: int) -> Ids:
        """`length` tokens from a random place."""
        stream = self.tokens(domain, split)
        start = drawn.integers(0, len(stream) - length + 1)
        return stream[start : start + length].astype(np.int64)

    def batch(self, seed: int, step: int, sequences: int, length: int, recall: float) -> Ids:
        """The training batch of a step, [sequences, length]: it depends on no step before it, so runs can resume.

        A sequence asks for recall with the chance `recall`, else it is text of a domain.
        """
        drawn = np.random.default_rng((seed, step))
        shares = [(1 - recall) * share for share in MIX.values()]
        kinds = drawn.choice(len(MIX) + 1, size=sequences, p=[*shares, recall])
        return np.stack([self._sequence(drawn, kind, length) for kind in kinds])

    def _sequence(self, drawn: np.random.Generator, kind: int, length: int) -> Ids:
        if kind < len(MIX):
            return self.piece(drawn, list(MIX)[kind], "train", length)
        filler = self.piece(drawn, str(drawn.choice(["books", "web"])), "train", length)
        if drawn.random() < 0.5:
            return copying(drawn, filler, self.encoder.get_vocab_size())
        return self._keys(drawn, filler)

    def _keys(self, drawn: np.random.Generator, filler: Ids) -> Ids:
        """Pass keys strewn over a text, all asked for at its end."""
        most = min(6, len(filler) // 40)  # a key that is told and asked for takes up to 40 tokens
        people = drawn.choice(NAMES, size=drawn.integers(1, most + 1), replace=False)
        told = [(self.ids(statement(name, number)), name, number) for name, number in with_numbers(drawn, people)]
        asked = [self.ids(question(name) + statement(name, number)) for _, name, number in told]
        questions = np.concatenate([asked[i] for i in drawn.permutation(len(asked))])
        room = len(filler) - len(questions) - sum(len(ids) for ids, _, _ in told)
        cuts = np.sort(drawn.integers(0, room + 1, size=len(told)))
        parts = [filler[: cuts[0]]]
        for i, (ids, _, _) in enumerate(told):
            parts += [ids, filler[cuts[i] : cuts[i + 1] if i + 1 < len(cuts) else room]]
        return np.concatenate([*parts, questions])

    def ids(self, text: str) -> Ids:
        """The tokens of a text."""
        return np.array(self.encoder.encode(text).ids, dtype=np.int64)

    def pass_key(self, drawn: np.random.Generator, distance: int) -> tuple[Ids, int]:
        """A pass key, `distance` tokens of held-out text, the question and the answer; and how many tokens answer."""
        ((name, number),) = with_numbers(drawn, drawn.choice(NAMES, size=1))
        filler = self.piece(drawn, "books", "valid", distance)
        asked = self.ids(question(name) + statement(name, number).removesuffix(f" {number}."))
        answer = self.ids(f" {number}")
        return np.concatenate([self.ids(statement(name, number)), filler, asked, answer]), len(answer)


def copying(drawn: np.random.Generator, filler: Ids, words: int) -> Ids:
    """A text in which a segment comes again: at once and repeatedly, or once more after other text.

    A third of the segments are shuffled and a third are random words, of `words`: only copying foretells them.
    """
    length = len(filler)
    size = int(np.exp(drawn.uniform(np.log(16), np.log(length // 2 + 1))))
    segment = filler[:size].copy()
    kind = drawn.integers(3)
    if kind == 0:
        drawn.shuffle(segment)
    elif kind == 1:
        segment = drawn.integers(1, words, size=size)  # word 0 separates documents
    if drawn.random() < 0.5:
        return np.resize(segment, length)
    start = int(drawn.integers(0, length - 2 * size + 1))
    again = int(drawn.integers(start + size, length - size + 1))
    result = np.concatenate([filler[size:], filler[:size]])
    result[start : start + size] = segment
    result[again : again + size] = segment
    return result


def with_numbers(drawn: np.random.Generator, names: NDArray[np.str_]) -> list[tuple[str, int]]:
    """A five-digit number for each name."""
    return [(str(name), int(drawn.integers(10_000, 100_000))) for name in names]


def statement(name: str, number: int) -> str:
    """The sentence that tells a pass key."""
    return f" The pass key of {name} is {number}."


def question(name: str) -> str:
    """The sentence that asks for it."""
    return f" What is the pass key of {name}?"
