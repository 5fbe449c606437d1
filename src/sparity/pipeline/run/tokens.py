"""From a recipe's text sections to token ids."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.calibration.protocols import PROTOCOLS, protocol_text
from sparity.calibration.text import read_documents
from sparity.calibration.tokens import Windows, draw_windows, read_tokens
from sparity.errors import InvalidInput
from sparity.models import transformers as hf
from sparity.quality.perplexity import split_windows
from sparity.recipe import Calibration, Measure, Text

DEFAULT_WINDOW = 2048

_tokenised: ContextVar[dict[tuple[str, ...], Tensor] | None] = ContextVar("_tokenised", default=None)


@contextmanager
def tokenised_once() -> Iterator[None]:
    """Within the context every text is read and tokenised once, however many jobs ask for it."""
    token = _tokenised.set({})
    try:
        yield
    finally:
        _tokenised.reset(token)


@dataclass(frozen=True)
class MeasuredText:
    """A text to measure on: 1-D ids and the window that they are cut into."""

    name: str
    ids: Tensor
    window: int


def calibration_tokens(calibration: Calibration, tokenizer: Any, config: Any) -> Tensor:
    """Token ids `[samples, length]`, read or drawn."""
    if calibration.tokens is not None:
        tokens = read_tokens(calibration.tokens, dimensions=2)
        context_window(config, tokens.shape[1])
        hf.check_vocabulary(tokens, config, calibration.tokens)
        return tokens
    if tokenizer is None:
        raise InvalidInput("the model has no tokenizer: give token ids as `calibration: {tokens: FILE.npy}`")
    length = context_window(config, calibration.length)
    windows = Windows(calibration.samples, length, calibration.seed, calibration.documents)

    def draw_from(text: str | list[str], windows: Windows) -> Tensor:
        documents = read_documents(text, calibration.field, tokenizer if calibration.chat else None)
        return draw_windows(documents, tokenizer, windows)

    def draw() -> Tensor:
        if isinstance(calibration.text, dict):
            return in_turns(list(calibration.text.values()), windows, draw_from)
        return draw_from(calibration.text or "", windows)

    tokens = _once(tokenizer, _key(calibration, "batch") + str(length), draw)
    hf.check_vocabulary(tokens, config, "this model's tokenizer")
    return tokens


def in_turns(domains: Sequence[str], windows: Windows, draw: Callable[[str, Windows], Tensor]) -> Tensor:
    """Windows `[samples, length]` of several texts, which take turns: one of the first, one of the second and so on."""
    count, chosen = len(domains), torch.empty(windows.samples, windows.length, dtype=torch.int64)
    if windows.samples < count:
        raise InvalidInput(f"calibration: {windows.samples} samples are too few for {count} domains: give one for each")
    for place, text in enumerate(domains):
        own = range(place, windows.samples, count)
        chosen[place::count] = draw(text, replace(windows, samples=len(own)))
    return chosen


def measured_texts(measure: Measure, tokenizer: Any, model: Any) -> Iterable[MeasuredText]:
    """The texts of a recipe's `measure` section, each checked to fill a window of the model."""
    for entry in measure.perplexity:
        text = Text.named(entry) if isinstance(entry, str) else entry
        yield measured_text(text, tokenizer, model, measure.window, measure.windows)


def measured_text(
    text: Text, tokenizer: Any, model: Any, wanted_window: int | None, windows: int | None = None
) -> MeasuredText:
    """The ids of a whole text: its documents joined by a blank line, special tokens once at the start.

    Only the first `windows` windows are kept.

    Raises:
        InvalidInput: no such text, or less of it than one window.
    """
    window = context_window(model.config, wanted_window)
    if text.tokens is not None:
        ids, name = read_tokens(text.tokens, dimensions=1), Path(text.tokens).stem
    else:
        if tokenizer is None:
            raise InvalidInput("the model has no tokenizer: measure on token ids (a .npy file)")
        ids = _once(tokenizer, _key(text, "name"), lambda: _whole_text(text, tokenizer))
        name = text.text if isinstance(text.text, str) else "text"
    if text.protocol is not None:
        name, most = text.protocol, PROTOCOLS[text.protocol].windows
        if windows is not None and windows < (most or windows + 1):
            name = f"{name}, {windows} windows"
        windows = min((each for each in (windows, most) if each is not None), default=None)
    cut = split_windows(model, ids, window)[:windows]
    return MeasuredText(text.name or name, cut.flatten(), window)


def _whole_text(text: Text, tokenizer: Any) -> Tensor:
    if text.protocol is not None:
        whole = protocol_text(text.protocol, text.text if isinstance(text.text, str) else None)
    else:
        whole = "\n\n".join(read_documents(text.text or "", text.field))
    return torch.tensor(tokenizer(whole, verbose=False)["input_ids"], dtype=torch.int64)


def _key(section: Calibration | Text, left_out: str) -> str:
    """What a section says but for one key; pydantic's own JSON cannot hold half a surrogate pair."""
    return json.dumps(section.model_dump(exclude={left_out}), sort_keys=True)


def _once(tokenizer: Any, source: str, read: Callable[[], Tensor]) -> Tensor:
    """What `read` gives, or gave before within `tokenised_once` for the same tokenizer and source."""
    known = _tokenised.get()
    if known is None:
        return read()
    key = (str(tokenizer.name_or_path), source)
    if key not in known:
        known[key] = read()
    return known[key]


def context_window(config: Any, wanted: int | None) -> int:
    """`wanted`, or 2048, or the model's context if that is less.

    Raises:
        InvalidInput: more than the model's context is wanted.
    """
    context = hf.context_length(config)
    if wanted is None:
        return min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    if context and wanted > context:
        raise InvalidInput(f"{wanted} tokens per window are more than the model's context of {context} tokens")
    return wanted


def default_device(device: str) -> str:
    """`device`, or the first GPU, or the CPU, for "auto".

    Raises:
        InvalidInput: the device cannot be used.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).item()  # the meta device, which computes nothing, fails here
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
