"""The examples in the docstrings of the public functions run and print what they say."""

import doctest
import inspect

import pytest

import sparity
from sparity import registry

WITH_EXAMPLES = (
    "activation_mask",
    "attach",
    "attached",
    "attention_blocks",
    "calibrate_attention",
    "cache",
    "cache_budgets",
    "calibrate_cache",
    "cut",
    "fit_activations",
    "load",
    "load_offloaded",
    "offload",
    "perplexity",
    "plan_shape",
    "prune_weight",
    "quantize_cache",
    "quantize_weight",
    "register",
    "restructure",
    "run",
    "score_cache",
    "select_cache",
    "sensitivity",
    "structure_scores",
    "sweep",
    "tune",
    "with_activations",
    "with_attention_blocks",
)


def examples(name):
    """The docstring of a public name as one doctest, with no names but those that it imports."""
    function = inspect.unwrap(getattr(sparity, name))
    return doctest.DocTestParser().get_doctest(function.__doc__, {}, f"sparity.{name}", None, 0)


def test_every_public_function_has_an_example():
    functions = [name for name in sparity.__all__ if inspect.isfunction(getattr(sparity, name))]
    assert sorted(functions) == sorted(WITH_EXAMPLES)
    assert [name for name in functions if not examples(name).examples] == []


@pytest.fixture
def own_plugins_only():
    """Afterwards the registry has lost what an example registered."""
    yield
    for key, plugin in list(registry._registered.items()):
        if plugin.__module__ == "builtins":  # of an example
            del registry._registered[key]


@pytest.mark.usefixtures("own_plugins_only")
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_an_example_prints_what_it_says(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = []
    found = doctest.DocTestRunner(verbose=False).run(examples(name), out=said.append)
    assert found.failed == 0, "".join(said)
    assert found.attempted > 1
    assert list(tmp_path.iterdir()) == []
