"""Where structured pruning comes from: filters of a small convolutional network, cut by norm and by Network Slimming.

    python benchmarks/filters.py [--steps 400] [--share 0.75] [--seeds 3] [--out FILE]

Bars in one of eight directions, drawn into noise, are told apart by three convolutions with batch normalisation, which
train in seconds. Then a share of the filters goes, and what is left is trained a fourth as long:

- by the L1 norm of their weights, as many in each layer (Li et al. 2017, arXiv:1608.08710);
- by the scale that batch normalisation gives their channel, over all layers together, in a network trained with an L1
  penalty on these scales (Network Slimming, Liu et al. 2017, arXiv:1708.06519);
- at random, as many in each layer: what a choice must beat;
- and the network of the cut sizes is trained from scratch, as long as all of that took (Liu et al. 2019,
  arXiv:1810.05270).

Accuracies are of 2,000 images that no training has seen: medians over the seeds with the lowest and the highest.
"""

import argparse
import copy
import math
import statistics

import torch
from torch import Tensor, nn

from results import save

SIDE, CLASSES, TESTED, BATCH = 16, 8, 2000, 64
WIDTHS = (32, 32, 32)
PENALTY = 1e-3  # on the scales of batch normalisation
FLOOR = 2  # filters that each layer keeps at least


def images(count: int, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bars `[count, 1, SIDE, SIDE]` through a random point, in noise, and their directions."""
    labels = torch.randint(CLASSES, (count,), generator=drawn)
    angle = labels * math.pi / CLASSES
    middle = SIDE / 2 + 4 * (torch.rand(count, 2, generator=drawn) - 0.5)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    across = (rows - middle[:, :1, None]) * angle.cos()[:, None, None] - (columns - middle[:, 1:, None]) * angle.sin()[
        :, None, None
    ]
    pixels = torch.exp(-(across**2) / 2) + torch.randn(count, SIDE, SIDE, generator=drawn)
    return pixels[:, None], labels


def network(widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Convolutions, each with batch normalisation and ReLU, the mean over the image, and a linear layer."""
    layers = list[nn.Module]()
    for before, width in zip((1, *widths), widths, strict=False):
        layers += [
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


def convolutions(net: nn.Sequential) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each with the normalisation behind it."""
    return [(layer, net[place + 1]) for place, layer in enumerate(net) if isinstance(layer, nn.Conv2d)]


def train(net: nn.Sequential, steps: int, seed: int, penalty: float = 0.0) -> nn.Sequential:
    """Train in place, on new images in every step; `penalty` times the L1 norm of the scales is added to the loss."""
    drawn = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    net.train()
    for _ in range(steps):
        pixels, labels = images(BATCH, drawn)
        loss = nn.functional.cross_entropy(net(pixels), labels)
        if penalty:
            loss = loss + penalty * sum(norm.weight.abs().sum() for _, norm in convolutions(net))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net


@torch.no_grad()
def accuracy(net: nn.Sequential) -> float:
    """The share of unseen images whose direction is found."""
    pixels, labels = images(TESTED, torch.Generator().manual_seed(2**31))
    return float((net.eval()(pixels).argmax(1) == labels).float().mean())


def kept_of_each(scores: list[Tensor], share: float) -> list[Tensor]:
    """The places of the filters that stay when each layer gives up the same share, those with the lowest scores."""
    stay = [max(FLOOR, round((1 - share) * len(score))) for score in scores]
    return [score.argsort(descending=True)[:count].sort().values for score, count in zip(scores, stay, strict=True)]


def kept_of_all(scores: list[Tensor], share: float) -> list[Tensor]:
    """The same with one threshold for all layers."""
    every = torch.cat(scores).sort(descending=True).values
    least = every[round((1 - share) * len(every)) - 1]
    return [score.argsort(descending=True)[: max(FLOOR, int((score >= least).sum()))].sort().values for score in scores]


@torch.no_grad()
def cut(net: nn.Sequential, kept: list[Tensor]) -> nn.Sequential:
    """The network without the other filters, their channels in the layer behind, and nothing else changed."""
    smaller = network(tuple(len(places) for places in kept))
    inputs = torch.arange(1)
    for (layer, norm), (old, old_norm), places in zip(convolutions(smaller), convolutions(net), kept, strict=True):
        layer.weight.copy_(old.weight[places][:, inputs])
        for name, values in old_norm.state_dict().items():
            norm.state_dict()[name].copy_(values[places] if values.dim() else values)
        inputs = places
    smaller[-1].weight.copy_(net[-1].weight[:, inputs])
    smaller[-1].bias.copy_(net[-1].bias)
    return smaller


def study(seed: int, steps: int, share: float) -> dict[str, tuple[float, float, int]]:
    """Row -> accuracy before and after the last training, and parameters."""
    torch.manual_seed(seed)
    start = network()
    dense = train(copy.deepcopy(start), steps, seed)
    slim = train(copy.deepcopy(start), steps, seed, PENALTY)
    norms = [layer.weight.abs().sum((1, 2, 3)) for layer, _ in convolutions(dense)]
    scales = [norm.weight.detach().abs() for _, norm in convolutions(slim)]
    by_norm = kept_of_each(norms, share)
    cuts = {
        "L1 norm of filters": cut(dense, by_norm),
        "at random": cut(dense, kept_of_each([torch.rand(len(norm)) for norm in norms], share)),
        "Network Slimming": cut(slim, kept_of_all(scales, share)),
    }
    rows = {"dense": (accuracy(dense),) * 2, "dense, with the penalty": (accuracy(slim),) * 2}
    sizes = {"dense": size(dense), "dense, with the penalty": size(slim)}
    for name, net in cuts.items():
        before, sizes[name] = accuracy(net), size(net)
        rows[name] = (before, accuracy(train(net, steps // 4, seed + 1)))
    fresh = network(tuple(len(places) for places in by_norm))
    name = "its sizes, from scratch"
    before, sizes[name] = accuracy(fresh), size(fresh)
    rows[name] = (before, accuracy(train(fresh, steps + steps // 4, seed)))
    return {name: (*found, sizes[name]) for name, found in rows.items()}


def size(net: nn.Sequential) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def shown(values: list[float]) -> str:
    """Median, lowest and highest, in per cent."""
    return f"{statistics.median(values):.1%} ({min(values):.1%}-{max(values):.1%})"


def main() -> None:
    """Measure, print a table as Markdown and write JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--share", type=float, default=0.75, help="of the filters that go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not 0 < options.share < 1 or options.steps < 4 or options.seeds < 1:
        parser.error("--share lies between 0 and 1, --steps is 4 or more, --seeds 1 or more")
    found = [study(seed, options.steps, options.share) for seed in range(options.seeds)]
    print("| row | parameters | cut | trained on |\n|---|---|---|---|")
    for name in found[0]:
        before, after, sizes = zip(*(each[name] for each in found), strict=True)
        print(f"| {name} | {statistics.median(sizes):,.0f} | {shown(list(before))} | {shown(list(after))} |")
    if options.out:
        command = (
            f"python benchmarks/filters.py --steps {options.steps} --share {options.share} --seeds {options.seeds}"
        )
        save({"command": command, "results": found}, options.out)


if __name__ == "__main__":
    main()
