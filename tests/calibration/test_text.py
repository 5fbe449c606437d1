import json

import pytest

from sparity.calibration.text import read_documents
from sparity.errors import CorruptFile, InvalidInput

DOCUMENTS = ["one document", "another\nwith two lines"]


def test_each_kind_of_file(tmp_path):
    rows = [{"text": document, "id": i} for i, document in enumerate(DOCUMENTS)]
    (tmp_path / "a.txt").write_text("whole\nfile")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(DOCUMENTS))
    assert read_documents(str(tmp_path / "a.txt")) == ["whole\nfile"]
    assert read_documents(str(tmp_path / "a.jsonl")) == DOCUMENTS
    assert read_documents(str(tmp_path / "a.json")) == DOCUMENTS
    assert read_documents(DOCUMENTS) == DOCUMENTS


def test_parquet_and_data_set_folder(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = pyarrow.table({"body": DOCUMENTS})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_documents(str(tmp_path / "a.parquet"), field="body") == DOCUMENTS
    folder = tmp_path / "set"
    folder.mkdir()
    parquet.write_table(table, folder / "train.parquet")
    parquet.write_table(pyarrow.table({"body": ["held out"]}), folder / "test.parquet")
    assert read_documents(str(folder), field="body") == DOCUMENTS
    assert read_documents(f"{folder}:test", field="body") == ["held out"]


def test_chat_rows_go_through_the_template():
    class Tokenizer:
        chat_template = "yes"

        def apply_chat_template(self, messages, tokenize):
            assert not tokenize
            return "|".join(message["content"] for message in messages)

    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    assert read_documents(rows, field="messages", chat_tokenizer=Tokenizer()) == ["hi|ho"]
    with pytest.raises(InvalidInput, match="not a list of messages"):
        read_documents(["hi"], chat_tokenizer=Tokenizer())
    with pytest.raises(InvalidInput, match="no chat template"):
        read_documents(rows, field="messages", chat_tokenizer=object())


def test_bundled_text_has_two_halves_without_a_common_document():
    for name in ("python-docs", "python-code"):
        calibration, held_out = read_documents(f"{name}:calibration"), read_documents(f"{name}:held-out")
        assert read_documents(name) == calibration
        assert len(calibration) > 30
        assert not set(calibration) & set(held_out)
    with pytest.raises(InvalidInput, match='no part "test"'):
        read_documents("python-docs:test")


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.txt", b"", InvalidInput, "holds no text"),
        ("a.txt", b" \n\t", InvalidInput, "holds no text"),
        ("a.txt", b"\xff\xfe", CorruptFile, "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', CorruptFile, "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}', InvalidInput, 'no field "text"; did you mean "txt"?'),
        ("a.jsonl", b"5", InvalidInput, "row 0: expected text, got int"),
        ("a.json", b'{"a": 1}', InvalidInput, "expected a list of texts"),
        ("a.parquet", b"PAR1", CorruptFile, "not a parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, error, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        read_documents(str(tmp_path / name))
    assert words in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(InvalidInput, match=r"text file missing\.txt does not exist"):
        read_documents("missing.txt")
