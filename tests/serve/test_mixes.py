"""An answer never depends on who asked before or beside it: tokens and logprobs are equal bit for bit."""

from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sparity
from families import build, tiny_configs
from served import Received, by_itself, execution_of
from sparity.engine.kernels import native
from sparity.serve.execution.steps import Steps
from sparity.serve.prefixes import Prefixes
from sparity.serve.sampling import Sampling
from sparity.serve.scheduler import Scheduler
from sparity.serve.sequence import Order

compiled = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
TEXT = torch.arange(128).reshape(2, 64) * 5 % 97
STARTS = [tuple((at * at + 3) % 97 for at in range(140)), tuple((7 * at) % 97 for at in range(140))]


def examples(count):
    """So many, always the same; they are not made smaller where one fails, which takes long."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],
    )


@st.composite
def orders(draw, longest):
    """An order that may begin as others do."""
    start = draw(st.sampled_from(STARTS))[: draw(st.integers(1, longest))]
    own = draw(st.lists(st.integers(0, 96), max_size=4))
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.0, 0.7, 2.0])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 20])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 2**64)),
    )
    return Order(
        prompt=(*start, *own),
        sampling=sampling,
        most=draw(st.integers(0, 8)),
        least=draw(st.integers(0, 3)),
        stop=tuple(draw(st.lists(st.text("#$%&'ABCDE", min_size=1, max_size=2), max_size=2))),
        stop_kept=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 2])),
    )


@st.composite
def mixes(draw, longest=30):
    """Orders, the step at which each comes, the step at which its client leaves, and the shape of the batch."""
    count = draw(st.integers(2, 6))
    asked = [(draw(st.integers(0, 12)), draw(orders(longest)), draw(st.integers(1, 60))) for _ in range(count)]
    return asked, draw(st.integers(1, 4)), draw(st.integers(4, 32)), draw(st.booleans())


def together(model, mix, context=192):
    """The outcome of each order of a mix whose client stayed."""
    asked, slots, most, reuse = mix
    execution = execution_of(model, slots, most, context)
    blocks = isinstance(execution, Steps) and reuse
    scheduler = Scheduler(execution, Prefixes(execution, 3 * execution.block_bytes(64)) if blocks else None)
    left, received = [(*one, Received(one[1])) for one in asked], []
    gone, step = [], 0
    while left or scheduler.waiting or scheduler.running:
        for one in [one for one in left if one[0] <= step]:
            scheduler.submit(one[3].answer)
            received.append(one)
            left.remove(one)
        for one in received:
            if one[0] + one[2] == step and one[3].answer.finish is None:
                scheduler.cancel(one[3].answer)
                gone.append(one)
        scheduler.step()
        step += 1
    return [(one[1], one[3].outcome) for one in received if one not in gone]


def check(model, mix, known, context=192):
    for order, outcome in together(model, mix, context):
        if order not in known:
            known[order] = by_itself(model, order, context=context)
        assert outcome == known[order]


def fast(model, form="smallest", values="same"):
    return sparity.attach(model, form=form, values=values)


@compiled
@pytest.mark.parametrize(
    ("family", "form", "values"),
    [
        ("llama", "smallest", "same"),
        ("qwen3", "columns", "same"),
        ("qwen2", "bitmask", "int8"),
        ("mistral", "dense", "same"),
    ],
)
def test_answers_of_random_mixes_are_those_of_each_alone(tiny, family, form, values):
    model, known = fast(tiny(family), form, values), {}

    @examples(7)
    @given(mixes(longest=130))
    def every_mix(mix):
        check(model, mix, known)

    every_mix()
    assert len(known) > 12


@compiled
@pytest.mark.parametrize("options", [{"prompt": "dense"}, {"prompt": "sparse", "first": 2}], ids=["dense", "sparse"])
def test_skipped_activations_in_batches(tiny, options):
    model, known = tiny("llama"), {}
    with sparity.with_activations(model, TEXT, method="teal", sparsity=0.5, **options):
        assert isinstance(execution_of(fast(model)), Steps)

        @examples(6)
        @given(mixes(longest=130))
        def every_mix(mix):
            check(model, mix, known)

        every_mix()


def runtime(model, kind):
    """A context in which a model has a run-time stage that works on each sequence."""
    if kind == "griffin":
        return sparity.with_activations(model, TEXT, method="griffin", sparsity=0.5)
    return sparity.cache(model, kind, 0.5, sinks=2, recent=4)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "float32", "griffin", "snapkv", "streaming_llm", "snapkv attached"])
def test_models_that_the_step_does_not_know_answer_one_by_one(tiny, kind):
    model, known = tiny(kind if kind in ("gpt2", "gemma2") else "llama"), {}
    model = model.float() if kind == "float32" else model
    with ExitStack() as closing:
        if kind.split()[0] in ("griffin", "snapkv", "streaming_llm"):
            closing.enter_context(runtime(model, kind.split()[0]))
        if kind.endswith(" attached"):
            fast(model)
        assert not isinstance(execution_of(model), Steps)

        @examples(4)
        @given(mixes(longest=30))
        def every_mix(mix):
            check(model, mix, known, context=64)

        every_mix()


@compiled
@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}])
def test_rotary_scaling(scaling):
    config = tiny_configs()["llama"]
    config.head_dim = 16
    config.rope_parameters = {"rope_theta": 10000.0, **scaling}
    known, model = {}, build(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    fast(model)

    @examples(4)
    @given(mixes(longest=130))
    def every_mix(mix):
        check(model, mix, known)

    every_mix()
