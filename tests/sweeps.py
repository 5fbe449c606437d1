"""What tests of sweeps share: what a sweep found, and which combinations it ran."""

from dataclasses import replace

from sparity.pipeline.run.runner import execute
from sparity.pipeline.studies import sweeping


def measured(result):
    """What a sweep found, without what the machine and the clock say."""
    return [replace(row, seconds=None, peak_memory=None) for row in result.report.rows]


def executed(monkeypatch):
    """The combinations that are run from here on, by their sparsity and score."""
    ran = []

    def watch(recipe, *arguments, **named):
        prune = recipe.stages[0]
        ran.append((prune.score or prune.solver, prune.sparsity))
        return execute(recipe, *arguments, **named)

    monkeypatch.setattr(sweeping, "execute", watch)
    return ran
