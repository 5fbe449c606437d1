"""What the dense model predicts, its likeliest tokens kept on disk; and what its blocks give."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration.mapped import create_tensor, flush, open_tensor
from sparity.calibration.tokens import token_hash
from sparity.files import read_json_object, write_json
from sparity.healing.heal.submodules import first_of
from sparity.models.families.base import family_of
from sparity.quality.perplexity import window_logits

LOGS, PLACES, STATE = "teacher-logs.bin", "teacher-places.bin", "teacher.json"
CHUNK = 8  # sequences between two notes of how far it is
BYTES = 8  # per likely token


class TopK:
    """Of every token but each sequence's last the k likeliest next ones and their log-probabilities.

    Attributes:
        logs: `[samples, length - 1, k]`, float32, in a file.
        places: the tokens, of the same shape, int32, in a file.
        vocabulary: how many tokens there are.
    """

    def __init__(self, logs: Tensor, places: Tensor, vocabulary: int) -> None:
        self.logs, self.places, self.vocabulary = logs, places, vocabulary

    @classmethod
    def gather(
        cls, dense: Any, tokens: Tensor, k: int, folder: Path, progress: Callable[[int, int], None] = lambda *_: None
    ) -> "TopK":
        """Run the dense model over the tokens `[samples, length]`, or go on where a killed process was.

        Args:
            dense: a transformers causal language model.
            tokens: token ids.
            k: how many are kept; as many as there are at most.
            folder: where the files lie.
            progress: told of the sequences that are done, and of all.
        """
        vocabulary = int(dense.config.vocab_size)
        shape = (len(tokens), tokens.shape[1] - 1, min(k, vocabulary))
        files = {folder / LOGS: torch.float32, folder / PLACES: torch.int32}
        known = {"shape": list(shape), "tokens": token_hash(tokens)}
        state = read_json_object(folder / STATE) if (folder / STATE).exists() else {}
        done = int(state.get("done", 0)) if {key: state.get(key) for key in known} == known else 0
        make = open_tensor if done else create_tensor
        logs, places = (make(path, shape, dtype) for path, dtype in files.items())
        for start in range(done, len(tokens), CHUNK):
            for sample in range(start, min(start + CHUNK, len(tokens))):
                found = window_logits(dense, tokens[sample])[:-1].log_softmax(-1).topk(shape[-1])
                logs[sample], places[sample] = found.values, found.indices
            for path in files:
                flush(path)
            done = min(start + CHUNK, len(tokens))
            write_json(folder / STATE, {**known, "done": done})
            progress(done, len(tokens))
        return cls(logs, places, vocabulary)

    def divergence(self, logits: Tensor, samples: Tensor) -> Tensor:
        """KL(dense || model) in nats per token, `[]`, of logits `[batch, length - 1, vocabulary]` of some sequences.

        All but the likeliest tokens count as one: no more than the KL of all, and equal where all are kept.
        """
        known, places = (held[samples].to(logits.device) for held in (self.logs, self.places))
        found = logits.float().log_softmax(-1).gather(-1, places.long())
        total = (known.exp() * (known - found)).sum(-1)
        if known.shape[-1] < self.vocabulary:
            tiny = torch.finfo(torch.float32).eps
            rest = [(1 - each.exp().sum(-1)).clamp_min(tiny) for each in (known, found)]
            total = total + rest[0] * (rest[0].log() - rest[1].log())
        mean: Tensor = total.mean()
        return mean


@contextmanager
def outputs(model: Any, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Within the context what these blocks of a model give is noted, one after another, in float32."""
    noted: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        noted.append(first_of(output).float())

    every = list(model.get_submodule(family_of(model.config).blocks).children())
    with ExitStack() as hooks:
        for index in blocks:
            hooks.callback(every[index].register_forward_hook(note).remove)
        yield noted


def cosine_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of hidden states `[..., hidden]`, the mean over tokens and blocks."""
    each = [1 - nn.functional.cosine_similarity(x, y, dim=-1).mean() for x, y in zip(found, wanted, strict=True)]
    mean: Tensor = torch.stack(each).mean()
    return mean
