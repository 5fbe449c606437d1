"""Windows of held-out text, and what a changed model says of them beside the dense one."""

import statistics

import torch

from sparity.calibration.text import read_documents
from sparity.errors import InvalidInput
from sparity.quality.perplexity import exp, losses_of, window_logits

WINDOW = 512


class Texts:
    """Windows of some texts, and the dense model's log-probabilities there."""

    def __init__(self, model, tokenizer, texts, windows):
        self.windows = {}
        for name, text in texts.items():
            ids = tokenizer("\n\n".join(read_documents(text)), verbose=False)["input_ids"]
            if len(ids) < windows * WINDOW:
                raise InvalidInput(f"{name} has {len(ids)} tokens, fewer than {windows} windows of {WINDOW}")
            self.windows[name] = torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)
        self.dense = {
            name: [window_logits(model, ids).log_softmax(-1) for ids in each] for name, each in self.windows.items()
        }

    def measured(self, model):
        """Each window's text with the losses of both models, KL and same top-1: one forward pass a step."""
        for name, windows in self.windows.items():
            for ids, dense in zip(windows, self.dense[name], strict=True):
                sparse = window_logits(model, ids).log_softmax(-1)
                p, q = dense[:-1], sparse[:-1]
                yield (
                    name,
                    {
                        "dense_loss": float(losses_of(dense, ids).mean()),
                        "loss": float(losses_of(sparse, ids).mean()),
                        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
                        "top1": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
                    },
                )


def mean(windows, what):
    """The mean over windows of a number that each has, or None."""
    found = [window[what] for window in windows if window[what] is not None]
    return statistics.fmean(found) if found else None


def change(windows):
    """By how much the perplexity rises, as a share."""
    return exp(mean(windows, "loss") - mean(windows, "dense_loss")) - 1
