"""How much a block turns its input."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def mean_cosine(inputs: Tensor, outputs: Tensor) -> float:
    """The mean over tokens of the cosine between hidden states before and behind a block, `[samples, tokens, hidden]`.

    One minus it is ShortGPT's block influence (Men et al. 2024, arXiv:2403.03853). Computed in float32, one sample at
    a time.
    """
    samples = [
        float(cosine_similarity(a.float(), b.float(), dim=-1).mean()) for a, b in zip(inputs, outputs, strict=True)
    ]
    return sum(samples) / len(samples)
