"""A model for lm-evaluation-harness: `lm_eval --model sparity` and `sparity eval --tasks`; needs the extra `eval`."""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparity.errors import InvalidInput
from sparity.measure.tasks.answering import answer
from sparity.measure.tasks.long_context import BORDER
from sparity.measure.tasks.names import Way
from sparity.measure.tasks.reading import Asked, Reader
from sparity.models.loading import load, load_tokenizer

MOST_NEW = 256  # tokens of a free answer where the task does not say


@register_model("sparity")
class SparityLM(TemplateLM):
    """A model as Sparity reads it: softmax in float32, fixed batches, no answers of another model from a cache.

    Args:
        path: a folder or name that `sparity.load` takes; left out where `model` is given.
        model: a loaded model, with whatever runs with it.
        tokenizer: its tokenizer; None = that of `path`, or of the model's folder.
        batch_size: questions per pass.
        max_length: the longest sequence; None = the model's context.
        dtype: a type's name, or "auto".
        way: "whole", "steps" or None, see `Reader`.
        device: where `path` is loaded; a GPU that is not there is the CPU, since the harness names one by default.
        max_batch_size: what the harness passes on; batches are fixed.
    """

    def __init__(
        self,
        path: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        batch_size: int | str | None = 1,
        max_length: int | None = None,
        dtype: str = "auto",
        way: Way | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if (path is None) == (model is None):
            raise InvalidInput("give either path=MODEL or a loaded model")
        if not str(batch_size or 1).isdigit():
            raise InvalidInput(f"batch_size {batch_size!r}: a whole number, the same for every model that is compared")
        place = device if device and (not device.startswith("cuda") or torch.cuda.is_available()) else "cpu"
        subject = load(str(path), device=place, dtype=dtype) if model is None else model
        self.tokenizer = tokenizer or load_tokenizer(path or subject.name_or_path)
        if self.tokenizer is None:
            raise InvalidInput("the model has no tokenizer, and tasks are texts")
        self.reader = Reader(subject, int(batch_size or 1), max_length, way)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise InvalidInput("the tokenizer has no token for the end of a text")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token of its beginning, else of its end."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def way(self) -> Way:
        """How the model reads."""
        return self.reader.way or "whole"

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return int(self.reader.length or 0)

    @property
    def tokenizer_name(self) -> str:
        """See the harness."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids as the tokenizer makes them: its first token once, no last one."""
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
        ended = special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if ended and not string.endswith(self.tokenizer.eos_token) else ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability, and whether it is what greedy decoding writes."""
        return self._scored([self._asked(*request.args) for request in requests])

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The same from ids: (texts, context, continuation)."""
        return self._scored([Asked(tuple(context), tuple(ids)) for _texts, context, ids in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in disjoint windows."""
        if self.reader.way == "steps":
            raise InvalidInput(
                "a text without a question has no context that a cache policy could evict from: measure its perplexity "
                "with sparity eval --text, or leave the policy out"
            )
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            asked = [Asked(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]
            totals.append(sum(found.logprob for found in self.reader.score(asked)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to its first stop string."""
        answers = []
        for request in requests:
            context, given = request.args
            wanted = normalize_gen_kwargs(given, MOST_NEW)
            if wanted.get("do_sample"):
                raise InvalidInput("answers are decoded greedily: leave do_sample and temperature out")
            before, border, after = context.rpartition(BORDER)
            ids = self.tok_encode(before + after)
            held = len(self.tok_encode(before)) if border else None
            stop = [*wanted["until"], self.tokenizer.eos_token or ""]
            answers.append(answer(self.reader, self.tokenizer, ids, held, stop, wanted["max_gen_toks"]))
        return answers

    def _asked(self, context: str, continuation: str) -> Asked:
        before, border, after = context.rpartition(BORDER)
        context = before + after
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            first = [self.prefix_token_id] if ids[0] != self.prefix_token_id else [ids.pop(0)]
            return Asked(tuple(first), tuple(ids))
        first, ids = self._encode_pair(context, continuation)
        return Asked(tuple(first), tuple(ids), len(self.tok_encode(before)) if border else None)

    def _scored(self, asked: Sequence[Asked]) -> list[tuple[float, bool]]:
        return [(found.logprob, found.greedy) for found in self.reader.score(asked)]
