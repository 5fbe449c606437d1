"""llama.cpp as a peer, with a stand-in for llama-cpp-python: after token n, n + 1 of eight is the likeliest by 2."""

import json
import math
import sys

import pytest
import torch

from gguf_models import tiny_llama
from sparity.errors import InvalidInput, SparityError
from sparity.measure.peers import llama as peer
from sparity.measure.peers.entrants import llama_entrants
from sparity.measure.peers.llama import GgufModel, Llama, check_same, find_python

STAND_IN = """
import json, os, shutil
import numpy as np

__version__ = "1.2.3"
LLAMA_FTYPE_MOSTLY_Q8_0, LLAMA_FTYPE_MOSTLY_Q4_1, LLAMA_FTYPE_MOSTLY_Q4_0 = 8, 41, 40
print("what a library prints is no answer")

class Llama:
    def __init__(self, path, **options):
        if not os.path.exists(path):
            raise ValueError("no file " + path)
        self.vocabulary, self.ctx, self.seen = options["n_ctx"] and 8, self, []
        self.every = options["logits_all"]

    def n_vocab(self):
        return self.vocabulary

    def reset(self):
        self.seen = []

    def eval(self, ids):
        self.seen += ids
        if ids == [7]:
            os._exit(3)
        self.scores = np.zeros((len(self.seen), self.vocabulary), np.float32)
        self.scores[np.arange(len(self.seen)), (np.array(self.seen) + 1) % self.vocabulary] = 2

def llama_get_logits_ith(context, which):
    return context.scores[which].ctypes.data_as(__import__("ctypes").POINTER(__import__("ctypes").c_float))

class Parameters(__import__("ctypes").Structure):
    _fields_ = [("ftype", __import__("ctypes").c_int), ("nthread", __import__("ctypes").c_int)]

def llama_model_quantize_default_params():
    return Parameters()

def llama_model_quantize(source, target, parameters):
    if not os.path.exists(source):
        return 1
    with open(target, "w") as file:
        json.dump([parameters._obj.ftype, parameters._obj.nthread], file)
    return 0
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/llama_cpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return sys.executable


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.gguf").write_text("weights")
    return tmp_path / "a.gguf"


def test_it_generates_what_is_likeliest_and_counts_as_ours_do(python, file):
    with Llama(python) as llama:
        assert llama.version == "1.2.3"
        model = GgufModel(llama, file, 32, 1)
        assert model.generate(torch.tensor([[5, 1]]), 4, []) == [2, 3, 4, 5]
        assert model.generate(torch.tensor([[5, 1]]), 9, [4]) == [2, 3]
        timed = model.time_generation(torch.tensor([[0]]), 3)
        assert 0 < timed.token < 60
        assert timed.first_token > 0


def test_perplexity_is_that_of_its_logits(python, file):
    """A right guess costs log(e^2 + 7) - 2, a wrong one log(e^2 + 7)."""
    wrong = math.log(math.exp(2) + 7)
    with Llama(python) as llama:
        model = GgufModel(llama, file, 32, 1)
        found = model.perplexity(torch.tensor([[0, 1, 2], [3, 4, 0]]))
        assert found == pytest.approx(math.exp(wrong - 2 * 3 / 4), rel=1e-6)
        assert model.logits(torch.tensor([0, 1])).tolist() == [[0, 2, *[0] * 6], [0, 0, 2, *[0] * 5]]


def test_other_weights_are_noticed(python, file):
    class Same:
        def __call__(self, ids):
            logits = torch.zeros(1, 32, 8)
            logits[0, torch.arange(32), (ids[0] + self.shift) % 8] = 2
            return type("Out", (), {"logits": logits})()

    model = Same()
    with Llama(python) as llama:
        model.shift = 1
        check_same(model, GgufModel(llama, file, 32, 1))
        model.shift = 2
        with pytest.raises(SparityError, match=r"something else, likeness 0.0000"):
            check_same(model, GgufModel(llama, file, 32, 1))


def test_it_quantises_by_type(python, file, tmp_path):
    with Llama(python) as llama:
        llama.quantise(file, tmp_path / "b.gguf", "Q4_1", 3)
        assert json.loads((tmp_path / "b.gguf").read_text()) == [41, 3]
        with pytest.raises(SparityError, match=r"could not quantise .*none.gguf to Q8_0"):
            llama.quantise(tmp_path / "none.gguf", tmp_path / "c.gguf", "Q8_0", 1)


def test_what_fails_there_is_said_here(python, file, tmp_path):
    with Llama(python) as llama:
        with pytest.raises(SparityError, match=r"llama.cpp: ValueError: no file .*none.gguf"):
            GgufModel(llama, tmp_path / "none.gguf", 8, 1)
        model = GgufModel(llama, file, 8, 1)
        with pytest.raises(SparityError, match="the process ended: what a library prints is no answer"):
            model.generate(torch.tensor([[7]]), 2, [])
        with pytest.raises(SparityError, match="the process ended"):
            model.generate(torch.tensor([[1]]), 2, [])


def test_a_python_that_cannot_run_it_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no-python cannot be started: No such file or directory"):
        Llama(str(tmp_path / "no-python"))


def test_a_broken_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('half of it is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InvalidInput, match=r"cannot run llama-cpp-python .*half of it is missing"):
        Llama(sys.executable)


def test_which_python(monkeypatch):
    assert find_python("/some/python") == "/some/python"
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    assert find_python(None) is None
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: name == "llama_cpp")
    assert find_python(None) == sys.executable


def test_entrants_of_the_demo(python, tmp_path):
    class Tokenizer:
        def apply_chat_template(self, messages, **options):
            return messages[0]["content"]

        def __call__(self, text, **options):
            return {"input_ids": [int(text)]}

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    tiny_llama(eos_token_id=4).save_pretrained(tmp_path / "dense")
    (tmp_path / "files").mkdir()
    windows = torch.tensor([[0, 1, 2, 3]])
    with Llama(python) as llama:
        found = list(llama_entrants(llama, tmp_path / "dense", tmp_path / "files", windows, Tokenizer()))
        assert [one.name for one in found] == ["llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0"]
        for one in found:
            path = tmp_path / "files" / f"{one.name.split()[1]}.gguf"
            assert (one.kind, one.weight_bytes) == ("peer", path.stat().st_size)
            assert one.perplexity == pytest.approx(math.exp(math.log(math.exp(2) + 7) - 2), rel=1e-6)
            assert one.answer(["1"]) == {"1": "2 3"}
