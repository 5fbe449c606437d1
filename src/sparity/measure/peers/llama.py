"""llama.cpp as a peer: GGUF files of the same weights, timed and measured like our own models.

It runs in a process of its own, in whichever Python has llama-cpp-python.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from sparity.errors import InvalidInput, SparityError
from sparity.measure.timing.generation import Stamps, Timed
from sparity.quality.perplexity import exp, losses_of

WORKER = Path(__file__).with_name("worker.py")
PACKAGE = "llama-cpp-python"
LIKENESS = 0.99  # of the logits of the same weights: the cosine at the median token, for in 16 bits single ones stray


def find_python(asked: str | None) -> str | None:
    """The Python that has llama-cpp-python: the one asked for, else this one where it has it, else none."""
    return asked or (sys.executable if importlib.util.find_spec("llama_cpp") else None)


class Llama:
    """A process that has llama.cpp; closing it ends it.

    Raises:
        InvalidInput: the Python cannot be started or has no llama-cpp-python.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
            )
        except OSError as error:
            self._said.close()
            raise InvalidInput(f"{python} cannot be started: {error.strerror or error}") from error
        try:
            self.version: str = self.ask("version")
        except SparityError as error:
            self.close()
            raise InvalidInput(f"{python} cannot run {PACKAGE} (pip install {PACKAGE}): {error}") from error

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process and free its memory."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, question: str, **details: Any) -> Any:
        """The answer to one of the worker's questions.

        Raises:
            SparityError: llama.cpp failed, or the process ended.
        """
        questions, answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        try:
            print(json.dumps({"ask": question, **details}), file=questions, flush=True)
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SparityError(f"{self._python}: the process ended: {self._last_words()}")
        said = json.loads(line)
        if "error" in said:
            raise SparityError(f"llama.cpp: {said['error']}")
        return said["answer"]

    def quantise(self, source: Path, target: Path, kind: str, threads: int) -> None:
        """Write a copy of a GGUF file in `Q8_0`, `Q4_1` or `Q4_0`, by llama.cpp's own code."""
        self.ask("quantise", source=str(source), target=str(target), kind=kind, threads=threads)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


class GgufModel:
    """A GGUF file that llama.cpp runs, with batch 1 and a key-value cache in float16; for `exact` logits in float32."""

    def __init__(self, llama: Llama, path: Path, context: int, threads: int, exact: bool = False) -> None:
        self._llama, self.path, self._context, self._threads, self._exact = llama, path, context, threads, exact
        self._model = llama.ask("load", path=str(path), context=context, threads=threads, every_logit=False)
        self._reader: int | None = None  # another copy, which gives all logits and is slower for it

    def time_generation(self, ids: Tensor, tokens: int) -> Timed:
        """As ours: greedy generation of `tokens` tokens after the first one; `ids` [1, prompt]."""
        found = self._ask("generate", self._model, ids[0], tokens=tokens + 1, ends=[])
        stamps = Stamps()
        stamps.begun, stamps.times = 0.0, found["seconds"]
        return stamps.timed()

    def generate(self, ids: Tensor, tokens: int, ends: Sequence[int]) -> list[int]:
        """The likeliest tokens after `ids` [1, prompt], at most `tokens`, without the one of `ends` that ends them."""
        made: list[int] = self._ask("generate", self._model, ids[0], tokens=tokens, ends=list(ends))["ids"]
        return made

    def perplexity(self, windows: Tensor) -> float:
        """Of windows of ids [windows, window]: the protocol of `sparity.perplexity`, from llama.cpp's own logits."""
        losses = [float(losses_of(self.logits(ids), ids).mean()) for ids in windows]
        return exp(sum(losses) / len(losses))

    def logits(self, ids: Tensor) -> Tensor:
        """After each of `ids` [tokens], at most the context -> [tokens, vocabulary], float32."""
        if self._reader is None:
            self._reader = self._llama.ask(
                "load",
                path=str(self.path),
                context=self._context,
                threads=self._threads,
                every_logit=True,
                exact=self._exact,
            )
        with tempfile.TemporaryDirectory(prefix="sparity-logits-") as folder:
            place = Path(folder) / "logits.npy"
            self._ask("logits", self._reader, ids, path=str(place))
            return torch.from_numpy(np.load(place))

    def _ask(self, question: str, model: int, ids: Tensor, **details: Any) -> Any:
        return self._llama.ask(question, model=model, ids=ids.tolist(), **details)


def check_same(model: Any, gguf: GgufModel) -> None:
    """Stop unless llama.cpp's logits are the model's, up to rounding.

    Raises:
        SparityError: it computes something else.
    """
    ids = torch.arange(1, 33)
    with torch.no_grad():
        ours = model(ids[None]).logits[0].float()
    likeness = float(torch.nn.functional.cosine_similarity(ours, gguf.logits(ids)).median())
    if likeness < LIKENESS:
        raise SparityError(f"{gguf.path}: llama.cpp computes something else, likeness {likeness:.4f}")
