"""Token files, batches and recall sequences."""

import tarfile

import numpy as np
import pytest

import zoo_data


def test_token_files_hold_the_documents_each_with_a_separator(corpus, texts):
    with tarfile.open(corpus / "web.tar.xz") as archive:
        content = archive.extractfile("web/valid.txt").read().decode()
    documents = content.split(f"\n{zoo_data.SEPARATOR}\n")
    ids = texts.tokens("web", "valid")
    assert (ids == 0).sum() == len(documents)
    assert ids[-1] == 0
    assert texts.encoder.decode(ids[: list(ids).index(0)].tolist()) == documents[0]


def test_files_are_made_once_and_a_subset_is_a_share_of_each_domain(corpus, tokenizer, tmp_path, capsys):
    folder = zoo_data.prepare(corpus, tokenizer, tmp_path, tokens=1000)
    again = zoo_data.prepare(corpus, tokenizer, tmp_path, tokens=1000)
    assert again == folder
    assert capsys.readouterr().out.count("code train") == 1
    sizes = {domain: len(np.fromfile(folder / f"{domain}-train.u16", np.uint16)) for domain in zoo_data.MIX}
    assert all(sizes[domain] >= 1000 * share for domain, share in zoo_data.MIX.items())
    assert zoo_data.prepare(corpus, tokenizer, tmp_path, tokens=2000) != folder


def test_a_preparation_that_is_cut_off_leaves_nothing_that_looks_finished(corpus, tokenizer, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo_data, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        zoo_data.prepare(corpus, tokenizer, tmp_path, tokens=1000)
    monkeypatch.undo()
    assert (zoo_data.prepare(corpus, tokenizer, tmp_path, tokens=1000) / "math-test.u16").exists()


def test_a_batch_depends_on_seed_and_step_alone(texts):
    first = texts.batch(0, 5, 8, 64, 0.5)
    assert first.shape == (8, 64)
    assert np.array_equal(first, texts.batch(0, 5, 8, 64, 0.5))
    assert not np.array_equal(first, texts.batch(0, 6, 8, 64, 0.5))
    assert not np.array_equal(first, texts.batch(1, 5, 8, 64, 0.5))


def test_the_stated_share_of_sequences_asks_for_recall(texts, monkeypatch):
    monkeypatch.setattr(zoo_data.Texts, "_sequence", lambda self, drawn, kind, length: np.full(length, kind))
    kinds = np.concatenate([texts.batch(0, step, 50, 1, 0.2)[:, 0] for step in range(100)])
    shares = np.bincount(kinds, minlength=5) / len(kinds)
    assert shares == pytest.approx([0.36, 0.28, 0.088, 0.072, 0.2], abs=0.02)


def test_copying_shows_a_segment_again():
    kinds = set()
    for seed in range(200):
        filler = np.arange(1000, 1128)
        result = zoo_data.copying(np.random.default_rng(seed), filler, 1_000_000)  # so many that none comes by chance
        assert result.shape == (128,)
        repeated = 128 - len(set(result.tolist()))
        assert repeated >= 16
        _, first, counts = np.unique(result, return_index=True, return_counts=True)
        at = sorted(first[counts > 1])
        distances = {int(np.flatnonzero(result == result[i])[1] - i) for i in at}
        assert len(distances) == 1  # the whole segment comes again at one distance
        segment = result[at]
        kinds.add("random" if segment.max() > 2000 else "text" if (np.diff(segment) == 1).all() else "shuffled")
    assert kinds == {"text", "shuffled", "random"}


def test_every_pass_key_that_is_told_is_asked_for_later_with_its_number(texts):
    for seed in range(50):
        drawn = np.random.default_rng(seed)
        ids = texts._keys(drawn, texts.piece(drawn, "books", "train", 256))
        assert len(ids) == 256
        text = texts.encoder.decode(ids.tolist())
        asked = text.split(" What is the pass key of ")[1:]
        assert 1 <= len(asked) <= 6
        for question in asked:
            name, answer = question.split("?", 1)
            assert answer.startswith(f" The pass key of {name} is ")
            assert text.count(answer.split(".")[0]) == 2


def test_a_probe_asks_over_the_stated_distance_and_ends_with_the_number(texts):
    ids, answer = texts.pass_key(np.random.default_rng(3), 100)
    text = texts.encoder.decode(ids.tolist())
    number = texts.encoder.decode(ids[-answer:].tolist()).strip()
    assert len(number) == 5
    assert text.count(f"is {number}") == 2
    assert text.endswith(f" is {number}")
    told = len(texts.ids(text[: text.index(number) + 6]))
    asked = len(texts.ids(text[text.rindex(" What is") :]))
    assert len(ids) - told - asked == 100
