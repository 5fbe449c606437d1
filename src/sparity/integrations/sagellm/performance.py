"""What the specification's benchmark asks of a model: seconds, perplexity, bytes."""

from collections.abc import Mapping
from typing import Any

from sparity.integrations.sagellm.loaded import SparseModel
from sparity.integrations.sagellm.protocol import SparsityConfig
from sparity.measure.timing.contenders import held_bytes
from sparity.measure.timing.generation import Timed, check_context, prompts, time_generation
from sparity.measure.timing.interleave import spread, take_turns
from sparity.models import transformers as hf
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.tokens import MeasuredText, measured_text
from sparity.quality.perplexity import perplexity
from sparity.recipe import SpeedTest, Text

TEXT, WINDOWS = "python-docs:held-out", 8  # what is measured on where nothing else is asked
Metrics = dict[str, float]


def load_model(model_path: str) -> Any:
    """The dense model, as transformers runs it."""
    return load(model_path)


def text_of(model: Any, text: str, window: int | None, windows: int | None) -> MeasuredText:
    """The ids that a model is measured on, by its own tokenizer."""
    return measured_text(Text.named(text), load_tokenizer(model.name_or_path), model, window, windows)


def measure_performance(
    model: Any, text: str = TEXT, *, window: int | None = None, windows: int = WINDOWS, speed: SpeedTest | None = None
) -> Metrics:
    """`ttft` and `tpot` in seconds, `ppl`, and `mem`, the bytes of the weights in memory.

    Args:
        model: of transformers, or what `load_sparse_model` gives.
        text: what perplexity is measured on, as in a recipe: a file, a data set, a bundled text, a .npy file of ids.
        window: tokens per window; None is 2048, or the context if that is less.
        windows: of the text, from its beginning.
        speed: tokens and rounds; None is the default, shortened to the context.
    """
    held = model.model if isinstance(model, SparseModel) else model
    test = SpeedTest.fitting(hf.context_length(held.config)) if speed is None else speed
    check_context("speed", held.config, test.prompt, test.tokens)
    measured = text_of(held, text, window, windows)
    ids = prompts(measured.ids, test.batch[0], test.prompt)
    (times,) = take_turns([lambda: time_generation(held, ids, test.tokens)], test.rounds)
    return {**seconds(times), "ppl": perplexity(held, measured.ids, measured.window), "mem": float(held_bytes(held))}


def seconds(times: list[Timed]) -> Metrics:
    """The medians of several generations: to the first token, and per token after it."""
    return {
        "ttft": spread([time.first_token for time in times]).median,
        "tpot": spread([time.token for time in times]).median,
    }


def comparison(dense: Mapping[str, float], sparse: Mapping[str, float], sparsity: dict[str, float]) -> dict[str, Any]:
    """The specification's report; speed-ups are dense seconds over sparse ones, above 1 where sparse is faster.

    The specification divides the other way round, by which a model that takes half the time is 0.5 times as fast.
    """
    return {
        "sparsity_ratio": sparsity,
        "speedup_decode": dense["tpot"] / sparse["tpot"],
        "speedup_prefill": dense["ttft"] / sparse["ttft"],
        "ppl_delta": sparse["ppl"] - dense["ppl"],
        "memory_saving": (dense["mem"] - sparse["mem"]) / dense["mem"],
    }


def benchmark_sparsity(model_path: str, config: SparsityConfig, **options: Any) -> dict[str, Any]:
    """Measure a model, prune it, measure it again: the specification's report.

    Args:
        model_path: a folder, a Hugging Face name or one of the zoo.
        config: what is done to it.
        options: those of `SparsityManager`.
    """
    from sparity.integrations.sagellm.manager import SparsityManager

    manager = SparsityManager(config, **options)
    how: dict[str, Any] = manager.measured_by
    dense = measure_performance(load_model(model_path), **how)
    path = manager.prune(model_path, config)
    sparse = measure_performance(manager.load_sparse_model(path, config), **how)
    return comparison(dense, sparse, manager.verify_sparsity(path))
