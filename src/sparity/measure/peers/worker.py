"""llama.cpp through llama-cpp-python, asked in JSON, a line each: run as a program by the Python that has it.

    PYTHON worker.py

A question is {"ask": NAME, ...}, the answer {"answer": ...} or {"error": TEXT}. It needs llama-cpp-python and nothing
of Sparity, so that interpreter may be another one than ours.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any

import numpy as np

_opened: list[Any] = []


def _package() -> Any:
    """llama-cpp-python, imported once what it prints goes to the errors."""
    import llama_cpp

    return llama_cpp


def version() -> str:
    """Of llama-cpp-python."""
    return str(_package().__version__)


def load(path: str, context: int, threads: int, every_logit: bool, exact: bool = False) -> int:
    """Read a GGUF file into memory; what is answered names it in other questions. `exact` keeps float32 keys."""
    cache = {"type_k": 0, "type_v": 0} if exact else {}  # of ggml's types
    _opened.append(
        _package().Llama(
            path,
            n_ctx=context,
            n_batch=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=every_logit,
            use_mmap=False,
            verbose=False,
            **cache,
        )
    )
    return len(_opened) - 1


def generate(model: int, ids: list[int], tokens: int, ends: list[int]) -> dict[str, list[Any]]:
    """The likeliest `tokens` after `ids`, up to one of `ends`, and the seconds after which each one came."""
    llama = _opened[model]
    llama.reset()
    begun = time.perf_counter()
    given, made, seconds = ids, [], []
    for _ in range(tokens):
        llama.eval(given)
        pointer = _package().llama_get_logits_ith(llama.ctx, -1)
        token = int(np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).argmax())
        seconds.append(time.perf_counter() - begun)
        given = [token]
        if token in ends:
            break
        made.append(token)
    return {"ids": made, "seconds": seconds}


def logits(model: int, ids: list[int], path: str) -> None:
    """Write the logits `[ids, vocabulary]` after each of `ids` as float32 to a .npy file."""
    llama = _opened[model]
    llama.reset()
    llama.eval(ids)
    np.save(path, np.asarray(llama.scores[: len(ids)], dtype=np.float32))


def quantise(source: str, target: str, kind: str, threads: int) -> None:
    """Write a quantised copy of a GGUF file with llama.cpp's own code."""
    package = _package()
    parameters = package.llama_model_quantize_default_params()
    parameters.ftype = getattr(package, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = threads
    if package.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")


QUESTIONS = {each.__name__: each for each in (version, load, generate, logits, quantise)}


def main() -> None:
    """Answer until there are no more questions; what llama.cpp prints goes to the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            said = {"answer": QUESTIONS[question.pop("ask")](**question)}
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever asks has to say it
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
