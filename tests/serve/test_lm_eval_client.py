"""lm-evaluation-harness's `local-completions` over HTTP: the log-probabilities are those of the model in process."""

import pytest

import sparity
from served_http import open_llama, serving
from sparity.models.loading import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
pytest.importorskip(
    "tenacity", reason="lm-evaluation-harness's HTTP client is not installed (pip install 'lm-eval[api]')"
)

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from sparity.measure.tasks.harness_model import SparityLM

LONG = "The list is sorted in place, and the method returns nothing. " * 8
PAIRS = [
    ("The following", " statement"),
    ("The following", " lighthouse keeper, who"),
    ("Question: What barks?\nAnswer:", " a dog"),
    ("Question: What barks?\nAnswer:", " the sea\nQuestion"),
    ("x", " = 1"),
]
TOO_LONG_FOR_ONE_STEP = (LONG, " A tuple cannot be changed")


def asked(pairs):
    return [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]


def over_http(served, folder, pairs, **options):
    client = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model="llama",
        tokenizer_backend="huggingface",
        tokenizer=str(folder),
        max_length=257,  # it takes one token less
        **options,
    )
    return client.loglikelihood(asked(pairs), disable_tqdm=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of `zoo:llama` in float32."""
    folder = tmp_path_factory.mktemp("float32") / "model"
    sparity.load("zoo:llama", dtype="float32").save_pretrained(folder)
    load_tokenizer("zoo:llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch", [1, 3])
def test_in_float32_every_text_has_the_log_probability_of_the_model_in_process(single, batch):
    pairs = [*PAIRS, TOO_LONG_FOR_ONE_STEP]
    with serving([open_llama(path=str(single))]) as served:
        found = over_http(served, single, pairs, batch_size=batch)
    expected = SparityLM(path=str(single), max_length=256).loglikelihood(asked(pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-5, rel=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
