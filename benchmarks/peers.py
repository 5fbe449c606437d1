"""llama.cpp beside us: GGUF files checked, quantised, and their decoding timed in llama-cpp-python."""

import ctypes

import llama_cpp
import numpy as np
import torch

from sparity.measure.timing.generation import Stamps

FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
_readers = {}  # path -> what reads whole windows


def check_same(model, path):
    """Stop unless llama.cpp's logits are the model's, up to rounding."""
    ids = list(range(1, 33))
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].float()
    other = llama_cpp.Llama(str(path), n_ctx=len(ids), logits_all=True, verbose=False)
    other.eval(ids)
    theirs = torch.from_numpy(np.array(other.scores[: len(ids)]))
    likeness = float(torch.nn.functional.cosine_similarity(ours, theirs).min())
    if likeness < 0.99:
        raise SystemExit(f"{path}: llama.cpp computes something else, likeness {likeness:.4f}")


def all_logits(path, ids):
    """The logits `[window, vocabulary]` of one window of ids, from a fresh start."""
    if path not in _readers:
        _readers[path] = llama_cpp.Llama(str(path), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
    reader = _readers[path]
    reader.reset()
    reader.eval(ids.tolist())
    return torch.from_numpy(np.array(reader.scores[: len(ids)]))


def quantise(source, target, kind, threads):
    """Write a quantised copy of a GGUF file with llama.cpp's own code."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")


class LlamaCpp:
    """A GGUF file in memory, timed like our own models: greedy, batch 1."""

    def __init__(self, path, context, threads):
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False
        )

    def generate(self, ids, tokens):
        """Seconds to the first token and at the median per token of `tokens` more, after a prompt [1, prompt]."""
        self._llama.reset()
        stamps = Stamps()
        stamps.put(ids)
        given = ids[0].tolist()
        for _ in range(tokens + 1):
            self._llama.eval(given)
            given = [int(self.logits().argmax())]
            stamps.put(given)
        return stamps.timed()

    def logits(self):
        """Of the last token [vocabulary]."""
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))
