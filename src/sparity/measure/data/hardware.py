"""What a processor can move and compute at most, and which zeros it gains from."""

import time
from dataclasses import dataclass

import torch

TWO_OF_FOUR = "2 of 4 kept"
MEASURED_BYTES = 1 << 28  # beyond the caches of most processors


@dataclass(frozen=True)
class Hardware:
    """Peaks, which no program reaches: times from them are the least that there can be.

    Attributes:
        name: of the processor.
        bandwidth: bytes per second from memory.
        flops: per second, dense products in bfloat16.
        two_of_four: whether products with 2 of 4 weights kept take half the time.
        engine: whether Sparity's engine runs there, which reads only what is kept while decoding.
        source: of the figures.
    """

    name: str
    bandwidth: float
    flops: float
    two_of_four: bool
    engine: bool
    source: str


DATA_SHEETS = {
    "a100": Hardware("A100 80 GB SXM", 2.039e12, 312e12, True, False, "NVIDIA's data sheet of the A100"),
    "h100": Hardware("H100 SXM", 3.35e12, 989e12, True, False, "NVIDIA's data sheet of the H100"),
    "h200": Hardware("H200 SXM", 4.8e12, 989e12, True, False, "NVIDIA's data sheet of the H200"),
    "b200": Hardware("B200", 8e12, 2250e12, True, False, "NVIDIA's data sheet of the DGX B200, per GPU"),
    "rtx4090": Hardware("RTX 4090", 1.008e12, 165e12, True, False, "NVIDIA's white paper of Ada"),
}


def read_rate(count: int = MEASURED_BYTES, rounds: int = 3) -> float:
    """Bytes per second that this process reads from memory in order, the best of some rounds."""
    numbers = torch.ones(count // 4)
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        float(numbers.sum())
        best = min(best, time.perf_counter() - begun)
    return count / best
