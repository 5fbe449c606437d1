"""Perplexity protocols: the exact text that the papers' code makes of a split."""

import json

import pytest

from sparity.calibration.protocols import PROTOCOLS, protocol_text
from sparity.cli.task_options import measured_on
from sparity.errors import InvalidInput
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.tokens import measured_text
from sparity.recipe import Text


def test_wikitext_keeps_ends_of_lines_and_blank_rows(tmp_path):
    """The data set has a row per line, with the line's end; a line of spaces is an empty row."""
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n One two . \u2028 three\n")
    rows = ["", " = Title = \n", "", " One two . \u2028 three\n"]
    assert protocol_text("wikitext2", str(tmp_path / "wiki.test.raw")) == "\n\n".join(rows)


def test_c4_takes_the_first_1100_documents(tmp_path):
    file = tmp_path / "c4.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(1200)))
    assert protocol_text("c4", str(file)) == " ".join(f"document {number}" for number in range(1100))


@pytest.mark.parametrize(("name", "join"), [("ptb", " "), ("ptb-gptq", "\n\n")])
def test_ptb_has_two_forms(tmp_path, name, join):
    (tmp_path / "ptb.txt").write_text(" no it was n't black monday \n but while <unk> \n")
    assert protocol_text(name, str(tmp_path / "ptb.txt")) == join.join(
        ["no it was n't black monday", "but while <unk>"]
    )


def test_windows_are_counted_by_the_protocol_and_named_where_they_are_fewer(tmp_path):
    file = tmp_path / "c4.jsonl"
    file.write_text("".join(json.dumps({"text": "The road runs along the river."}) + "\n" for _ in range(1200)))
    model, tokenizer = load("zoo:llama"), load_tokenizer("zoo:llama")
    text = Text(protocol="c4", text=str(file))
    whole = measured_text(text, tokenizer, model, 16)
    assert (whole.name, len(whole.ids), whole.window) == ("c4", 256 * 16, 16)
    ids = tokenizer(" ".join(["The road runs along the river."] * 1100))["input_ids"]
    assert whole.ids.tolist() == ids[: 256 * 16]
    few = measured_text(text, tokenizer, model, 16, 3)
    assert (few.name, len(few.ids)) == ("c4, 3 windows", 48)


def test_the_recipe_knows_the_same_protocols(tmp_path):
    assert set(Text.model_json_schema()["properties"]["protocol"]["anyOf"][0]["enum"]) == set(PROTOCOLS)
    with pytest.raises(ValueError, match="protocol"):
        Text(protocol="c4", tokens="x.npy")
    assert [each.protocol for each in measured_on(None, "text", "ptb", tasks=True)] == ["ptb"]
    assert measured_on(None, "text", None, tasks=True) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: protocol_text("wiki", None), "one of wikitext2"),
        (lambda folder: protocol_text("ptb", str(folder / "none.txt")), "does not exist"),
        (lambda folder: protocol_text("wikitext2", str(folder / "rows.jsonl")), "text file itself"),
        (lambda folder: protocol_text("wikitext2", str(folder / "unk.txt")), "tokenised form"),
        (lambda folder: measured_on(["a", "b"], "text", "ptb", tasks=False), "one text"),
        (lambda folder: measured_on(None, "text", "pile", tasks=False), "--protocol pile"),
    ],
)
def test_what_is_no_protocol_is_refused(tmp_path, call, words):
    (tmp_path / "unk.txt").write_text(" the <unk> \n")
    with pytest.raises(InvalidInput, match=words):
        call(tmp_path)
