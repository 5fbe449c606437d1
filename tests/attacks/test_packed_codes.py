"""Huffman-coded matrices from a stranger who computes every hash: refused, without the memory that they claim."""

import json
import tracemalloc
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_folders import change
from sparity.checkpoints import packed_file
from sparity.checkpoints.coded_matrix import coded
from sparity.errors import CorruptFile
from sparity.formats import build_format, unpack
from sparity.formats.storage.streams import chunks_of

ROWS, COLUMNS = 24, 100  # 2,400 weights: five chunks


def weight(part="values"):
    """Few values; for gaps 400 rows, of which three weights in a hundred are kept."""
    generator = torch.Generator().manual_seed(0)
    rows, keep = (ROWS, 1) if part == "values" else (400, 0.03)
    found = torch.randint(-3, 4, (rows, COLUMNS), generator=generator).bfloat16()
    return torch.where(torch.rand(rows, COLUMNS, generator=generator) < keep, found, 0.0)


@dataclass(frozen=True)
class Code:
    """A book and its code, taken apart."""

    book: torch.Tensor
    lengths: torch.Tensor  # uint8
    sizes: torch.Tensor  # int16
    stream: torch.Tensor  # uint8

    @classmethod
    def of(cls, book, code, count):
        symbols, begin = len(book), len(book) + 2 * chunks_of(count)
        return cls(book, code[:symbols], code[symbols:begin].clone().view(torch.int16), code[begin:])

    def tensors(self, part):
        pieces = (self.lengths, self.sizes.view(torch.uint8), self.stream)
        return {f"{part}_book": self.book, f"{part}_code": torch.cat(pieces)}


def attack(part="values", format="dense", said=None, stored=None, **edits):
    """Header entry and tensors after edits of pieces of a code, of its entry and of whole tensors, every hash right."""
    packed = build_format(format).pack(weight(part))
    tensors, about = coded(packed)
    code = Code.of(tensors[f"{part}_book"], tensors[f"{part}_code"], about["count"])
    code = replace(code, **{piece: edit(getattr(code, piece)) for piece, edit in edits.items()})
    tensors = {**tensors, **code.tensors(part), **(stored or {})}
    return packed_file.describe(packed, tensors, {**about, **(said or {})}), tensors


def edited(tensor, place, value):
    copy = tensor.clone()
    copy[place] = value
    return copy


def moved_end(sizes):
    """One chunk a bit longer and the next a bit shorter."""
    return edited(edited(sizes, 0, sizes[0] + 1), 1, sizes[1] - 1)


def codewords(count, length):
    """So many symbols whose codewords all have one length."""
    return {
        "book": lambda t: torch.zeros(count, dtype=t.dtype),
        "lengths": lambda t: torch.full((count,), length, dtype=torch.uint8),
    }


def gaps(**edits):
    return attack("gaps", **edits)


def three_of_four():
    """Most weights are kept, and the header says two_of_four."""
    entry, stored = attack()
    entry = {**entry, "format": "two_of_four"}
    entry["hash"] = packed_file.entry_hash({key: value for key, value in entry.items() if key != "hash"})
    return entry, stored


ATTACKS = {
    "a byte of the stream missing": (lambda: attack(stream=lambda t: t[:-1]), "bytes are stored"),
    "a byte left over": (lambda: attack(stream=lambda t: torch.cat((t, t[:1]))), "bytes are stored"),
    "no stream": (lambda: attack(stream=lambda t: t[:0]), "but 0 bytes are stored"),
    "a bit behind the last": (lambda: attack(stream=lambda t: edited(t, -1, t[-1] | 1)), "behind the last"),
    "nothing but ones": (lambda: attack(stream=lambda t: t | 255), "ends elsewhere|behind"),
    "no code": (
        lambda: attack(stored={"values_code": torch.zeros(0, dtype=torch.uint8)}),
        "a code of 0 bytes has no room for 7 lengths",
    ),
    "half a size": (
        lambda: attack(stored={"values_code": torch.ones(16, dtype=torch.uint8)}),
        "a code of 16 bytes has no room for 7 lengths",
    ),
    "a size of nothing": (lambda: attack(sizes=lambda t: edited(t, 2, 0)), "takes 0 bits"),
    "a negative size": (lambda: attack(sizes=lambda t: edited(t, 2, -5)), "takes -5 bits"),
    "an end that is moved": (lambda: attack(sizes=moved_end), "ends elsewhere"),
    "the largest sizes": (lambda: attack(sizes=lambda t: t | 32767), "bytes are stored"),
    "fewer bits than weights": (
        lambda: attack(sizes=lambda t: t * 0 + 1, stream=lambda t: t[:1] * 0),
        "a bit each at least",
    ),
    "too many codewords": (lambda: attack(lengths=lambda t: edited(t, 0, 1)), "more codewords than there is room"),
    "all of one bit": (lambda: attack(lengths=lambda t: t * 0 + 1), "more codewords than there is room"),
    "too few codewords": (lambda: attack(lengths=lambda t: t * 0 + 16), "fewer codewords than fit"),
    "a codeword without bits": (lambda: attack(lengths=lambda t: edited(t, 1, 0)), "1 to 16 bits, not 0"),
    "a codeword too long": (lambda: attack(lengths=lambda t: edited(t, 1, 17)), "1 to 16 bits"),
    "one of 255 bits": (lambda: attack(lengths=lambda t: edited(t, 1, 255)), "or 255"),
    "an empty book": (lambda: attack(**codewords(0, 1)), "a code of 0 symbols"),
    "a book of one entry": (lambda: attack(**codewords(1, 1)), "bytes are stored|ends elsewhere"),
    "more symbols than there are": (lambda: attack(**codewords(2**16 + 1, 16)), "a code of 65537 symbols"),
    "a book that is shorter": (lambda: attack(book=lambda t: t[:-1].clone()), "codewords|bits|bytes"),
    "a book that is longer": (lambda: attack(book=lambda t: torch.cat((t, t))), "codewords|bits|bytes"),
    "a book in two dimensions": (lambda: attack(book=lambda t: t[:, None]), "each a list"),
    "a book of another type": (lambda: attack(book=lambda t: t.half()), "a book of torch.bfloat16 and a code"),
    "a book of truths": (lambda: attack(book=lambda t: t != 0), "not torch.bool"),
    "a code of signed bytes": (
        lambda: attack(stored={"values_code": torch.zeros(9, dtype=torch.int8)}),
        "not torch.bfloat16, torch.int8",
    ),
    "another layout": (lambda: attack(said={"layout": "zip"}), "a code has a layout, all or gaps"),
    "a layout that is a list": (lambda: attack(said={"layout": ["all"]}), "makes no sense"),
    "a count that is true": (lambda: attack(said={"count": True}), "a code has a layout"),
    "a weight more": (lambda: attack(said={"count": 2401}), "2401 values under a code do not make up 24 x 100"),
    "a negative count": (lambda: attack(said={"count": -2400}), "do not make up"),
    "a count of many digits": (lambda: attack(said={"count": 10**400}), "do not make up"),
    "gaps that are not there": (lambda: attack(said={"layout": "gaps"}), "its code lacks gaps_book, gaps_code"),
    "a tensor of the format beside": (
        lambda: attack(stored={"values": torch.zeros(1).bfloat16()}),
        r"beside a code, the tensors \['values'\]",
    ),
    "scales beside": (lambda: attack(stored={"scales": torch.ones(24)}), r"the tensors \['scales'\] are none"),
    "a mask that is none of the format": (three_of_four, "prune with the pattern 2:4"),
    "gaps, one of nothing": (lambda: gaps(book=lambda t: edited(t, 0, 0)), "do not lead from the first"),
    "gaps, one more": (lambda: gaps(book=lambda t: edited(t, 0, t[0] + 1)), "do not lead from the first"),
    "gaps, as far as can be": (lambda: gaps(book=lambda t: t | 255), "do not lead from the first"),
    "gaps, a longer type": (lambda: gaps(book=lambda t: t.long()), "a book of torch.uint8"),
    "gaps, none": (lambda: gaps(said={"count": 0}), "0 values under a code do not make up"),
    "gaps, too few": (lambda: gaps(said={"count": 9}), "9 values under a code do not make up"),
    "gaps, more than weights": (lambda: gaps(said={"count": 2**40}), "do not make up"),
    "gaps, fewer than said": (lambda: gaps(said={"count": 40_000}), "takes .* bits|no room|codewords"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_contradiction_whose_every_hash_is_right_is_refused(name):
    make, words = ATTACKS[name]
    entry, stored = make()
    entry = json.loads(json.dumps(entry))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFile, match=words) as caught:
            packed_file.restore("a file", entry, stored)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("a file")
    assert str(caught.value).count("a file") == 1
    assert peak < 8e6


@pytest.mark.parametrize("part", ["values", "gaps"])
def test_what_is_left_as_it_is_is_read(part):
    entry, stored = attack(part)
    assert torch.equal(unpack(packed_file.restore("a file", entry, stored)), weight(part))


@pytest.mark.parametrize("rows", [2**20, 2**31 - 1])
def test_a_few_bytes_do_not_claim_all_memory(rows):
    """A bit stands for a weight, or for 255 of them, and no shape beyond that is believed."""
    for part in ("values", "gaps"):
        entry, stored = attack(part)
        entry = {**entry, "shape": [rows, 2]}
        for said in (entry["coded"], {**entry["coded"], "count": 2 * rows}):
            entry |= {"coded": said}
            entry["hash"] = packed_file.entry_hash({key: value for key, value in entry.items() if key != "hash"})
            tracemalloc.start()
            try:
                with pytest.raises(CorruptFile, match=r"do not make up|no room for|codewords"):
                    packed_file.restore("a file", entry, stored)
                assert tracemalloc.get_traced_memory()[1] < 8e6
            finally:
                tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(part=st.sampled_from(("values", "gaps")), places=st.lists(st.integers(0, 7000), min_size=1, max_size=4))
def test_a_damaged_stream_is_refused_or_gives_weights_of_the_book(part, places):
    def damage(stream):
        copy = stream.clone()
        for place in places:
            copy[place // 8 % len(copy)] ^= 1 << place % 8
        return copy

    entry, stored = attack(part, stream=damage)
    found, said = torch.zeros(1), "read"
    try:
        found = unpack(packed_file.restore("a file", entry, stored))
    except CorruptFile as error:
        said = str(error)
    assert any(words in said for words in ("read", "ends elsewhere", "behind the last", "do not lead from"))
    assert set(found.flatten().tolist()) <= {0.0, *stored["values_book"].tolist()}


def drop(about, header, tensors):
    del about["matrices"]["a"]["hashes"]["values_code"], header["a.values_code"], tensors["a.values_code"]


ENTRIES = {
    "a piece is missing": (drop, "its code lacks values_code"),
    "a list": (lambda about, *_: about["matrices"]["a"].update(coded=["values"]), "a code has a layout, all or gaps"),
    "nothing said of the code": (lambda about, *_: about["matrices"]["a"].pop("coded"), "expected the tensors"),
    "another shape of as many": (lambda about, *_: about["matrices"]["a"].update(shape=[100, 25]), "do not make up"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_lies_is_refused(tmp_path, name):
    edit, words = ENTRIES[name]
    path = tmp_path / "packed.safetensors"
    packed_file.write(path, {"a": build_format("dense").pack(weight())}, huffman=True)
    assert packed_file.read(path)
    change(path, edit)
    with pytest.raises(CorruptFile, match=words):
        packed_file.read(path)


def test_an_altered_piece_is_seen_by_its_hash():
    entry, stored = attack()
    stored["values_code"] = edited(stored["values_code"], 0, 7)
    with pytest.raises(CorruptFile, match='the tensor "values_code" was altered'):
        packed_file.restore("a file", entry, stored)
