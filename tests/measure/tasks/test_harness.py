"""Task files and the harness: prompts in the official form, scores, policies, and the harness's own command line."""

import copy
import json
import sys
from dataclasses import replace

import pytest

import sparity
from sparity.errors import InvalidInput
from sparity.integrations.lm_eval import arguments
from sparity.measure.data.task_comparison import compare_task
from sparity.measure.tasks.long_context import BORDER
from sparity.measure.tasks.names import FILES, checked_tasks, own_tasks
from sparity.measure.tasks.pairs import run_beside
from sparity.measure.tasks.reading import Asked, Reader
from sparity.models.loading import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from sparity.measure.tasks.harness_model import SparityLM
from sparity.measure.tasks.rows import long_context
from sparity.measure.tasks.running import Settings, run_tasks

ROWS = [
    {"query": "Question: What is two and two?", "choices": ["four", "a lighthouse"], "gold": 0},
    {"query": "Question: What barks?", "choices": ["a stone", "a dog", "the sea"], "gold": 1},
    {"query": "Question: What is wet?", "choices": ["fire", "rain"], "gold": 1},
]
PROMPTS = {  # the last line of the official prompt, and what stands before an answer
    "arc_easy": "Answer:",
    "arc_challenge": "Answer:",
    "piqa": "Answer:",
    "boolq": "Answer:",
    "mmlu_sample": "Answer:",
    "gsm8k": "Answer:",
}
TOKENIZER = "zoo:llama"


@pytest.fixture(scope="module")
def model():
    return sparity.load("zoo:llama", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("zoo:llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of task files with three questions."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "llm-foundry-eval").mkdir()
    (folder / "llm-foundry-eval" / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(folder)


def test_a_local_task_is_scored_as_its_definition_says(model, tokenizer, data):
    (found,) = run_tasks(model, tokenizer, "arc_easy", Settings(data=data))
    encode = lambda text: tuple(tokenizer(text)["input_ids"])  # noqa: E731
    right = []
    for row in ROWS:
        prompt = encode(f"{row['query']}\nAnswer:")
        asked = [Asked(prompt, encode(f"{row['query']}\nAnswer: {choice}")[len(prompt) :]) for choice in row["choices"]]
        each = [scored.logprob for scored in Reader(model).score(asked)]
        lengths = [len(choice) for choice in row["choices"]]
        right.append([max(each), max(a / b for a, b in zip(each, lengths, strict=True))])
        right[-1] = [
            float(each.index(right[-1][0]) == row["gold"]),
            float([a / b for a, b in zip(each, lengths, strict=True)].index(right[-1][1]) == row["gold"]),
        ]
    assert [(score.metric, score.items) for score in found.scores] == [
        ("acc", tuple(one[0] for one in right)),
        ("acc_norm", tuple(one[1] for one in right)),
    ]
    assert found.main.value == pytest.approx(sum(found.main.items) / 3)
    assert (found.label, found.fewshot, found.way, found.cut) == ("arc_easy (own file, official format)", 0, "whole", 0)


def test_examples_are_other_questions_and_stated(model, tokenizer, data):
    (found,) = run_tasks(model, tokenizer, "arc_easy", Settings(data=data, fewshot=2, limit=2))
    assert found.fewshot == 2
    assert len(found.main.items) == 2
    plain = run_tasks(model, tokenizer, "arc_easy", Settings(data=data, limit=2))[0]
    assert plain.hashes == found.hashes
    with pytest.raises(InvalidInput, match="numbers of examples"):
        compare_task(plain, found)


def test_drop_all_falls_to_chance_and_keep_all_stays_dense(model, tokenizer):
    """Pass keys: the dense model finds most of them; without a cache it cannot, and the choices are four."""
    settings = Settings(items=12, context=64)
    (dense,) = run_tasks(model, tokenizer, "passkey", replace(settings, way="steps"))
    assert dense.main.value > 0.8
    with sparity.cache(model, "keep_all", keep=0.5):
        assert run_tasks(model, tokenizer, "passkey", settings) == (dense,)
    with sparity.cache(model, "drop_all", keep=0.5, sinks=0, recent=0):
        (blind,) = run_tasks(model, tokenizer, "passkey", settings)
    assert blind.main.value <= 0.5  # more than 6 of 12 would be one chance in 70
    found = compare_task(dense, blind)
    assert found.differs
    assert found.p < 0.05


def test_two_models_read_in_the_same_way(model, tokenizer, data):
    """A policy in one of them makes both read in steps."""
    with sparity.cache(copy.deepcopy(model), "knorm", keep=0.5) as evicting:
        asked, compared = run_beside(evicting, model, tokenizer, ["arc_easy"], Settings(data=data))
    assert asked[0].way == "steps"
    assert (compared[0].items, compared[0].source) == (3, "own file, official format")


def test_a_question_asked_later_is_held_back(model, tokenizer):
    subject = SparityLM(model=model, tokenizer=tokenizer)
    border = "The key is 7." + BORDER + "\n\nWhich key? It is"
    asked, together = subject._asked(border, " 7"), subject._asked(border.replace(BORDER, ""), " 7")
    assert asked == replace(together, held=len(tokenizer("The key is 7.")["input_ids"]))
    assert together.held is None
    rows = long_context("passkey", later=True, tokenizer=TOKENIZER, context=80, items=1)["test"]
    assert rows[0]["query"].index(BORDER) < rows[0]["query"].index("What is the pass key?")


def test_free_answers_end_at_their_stop_string(model, tokenizer):
    subject = SparityLM(model=model, tokenizer=tokenizer)
    ids = tokenizer("The with statement", return_tensors="pt")
    whole = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(whole)
    stop = text.split()[2]
    asked = [
        Instance("generate_until", {}, ("The with statement", {"until": until, "max_gen_toks": 12}), 0)
        for until in ([], [stop])
    ]
    assert subject.generate_until(asked) == [text, text[: text.index(stop)]]
    sampled = Instance("generate_until", {}, ("The", {"do_sample": True, "temperature": 1.0}), 0)
    with pytest.raises(InvalidInput, match="greedily"):
        subject.generate_until([sampled])


def test_whole_texts_are_scored_in_windows_that_do_not_overlap(model, tokenizer):
    text = "The with statement is used to wrap the execution of a block."
    subject = SparityLM(model=model, tokenizer=tokenizer, max_length=8)
    (found,) = subject.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids = tokenizer(text)["input_ids"]
    windows, previous = [], tokenizer.bos_token_id
    for start in range(0, len(ids) - len(ids) % 8, 8):
        windows.append(Asked((previous,), tuple(ids[start : start + 8])))
        previous = ids[start + 7]
    rest = len(ids) % 8  # the last window is as long as the others, and only its end counts
    windows.append(Asked(tuple(ids[-9:-rest]), tuple(ids[-rest:])))
    expected = sum(scored.logprob for scored in Reader(model).score(windows))
    assert found == pytest.approx(expected, rel=1e-5)
    with sparity.cache(model, "knorm", keep=0.5), pytest.raises(InvalidInput, match="no context"):
        SparityLM(model=model, tokenizer=tokenizer).loglikelihood_rolling([])


def test_a_text_without_context_follows_the_first_token(model, tokenizer):
    subject = SparityLM(model=model, tokenizer=tokenizer)
    (found,) = subject.loglikelihood([Instance("loglikelihood", {}, ("", "The end"), 0)])
    ids = tuple(tokenizer("The end")["input_ids"])
    (expected,) = Reader(model).score([Asked((tokenizer.bos_token_id,), ids)])
    assert found == (expected.logprob, expected.greedy)


@pytest.mark.parametrize("name", own_tasks())
def test_every_task_file_asks_in_the_official_form(name, assets):
    """The first item of the file itself; no model is needed."""
    manager = TaskManager(
        include_path=str(FILES),
        include_defaults=False,
        metadata={"data": str(assets / "data"), "tokenizer": TOKENIZER, "context": 200, "items": 2},
    )
    (task,) = manager.load([f"own_{name}"])["tasks"].values()
    task.set_fewshot_seed(seed=1)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    requests = [instance.args for instance in task.instances]
    if name in PROMPTS:
        assert requests[0][0].endswith(f"\n{PROMPTS[name]}")
    if task.OUTPUT_TYPE == "multiple_choice":
        assert len(requests) == len(task.doc_to_choice(next(iter(task.test_docs()))))
        assert all(answer.startswith(" ") and len(answer) > 1 for _, answer in requests)
    elif name == "lambada_openai":
        assert len(requests[0][1].split()) == 1
    elif name == "gsm8k":
        assert requests[0][0].count("Question: ") == 6  # five examples and the question
        assert "####" in requests[0][0]


def test_the_harness_knows_the_model_and_finds_the_files():
    assert get_model("sparity") is SparityLM
    assert arguments(["run", "--tasks", "own_piqa"])[-2:] == ["--include_path", str(FILES)]
    assert arguments(["ls", "tasks"]) == ["ls", "tasks"]
    assert arguments(["run", "--include_path", "mine"]) == ["run", "--include_path", "mine"]


def test_the_harness_s_own_command_line_runs_the_model(data, monkeypatch, tmp_path):
    from lm_eval import tasks

    from sparity.integrations import lm_eval as runner

    monkeypatch.setenv("SPARITY_DATA", data)
    monkeypatch.chdir(tmp_path)
    few = lambda **given: TaskManager(**{**given, "include_defaults": False})  # noqa: E731  # thousands of files less
    monkeypatch.setattr(tasks, "TaskManager", few)
    words = (
        "sparity run --model sparity --model_args path=zoo:llama,dtype=float32 --tasks own_arc_easy --output_path out"
    )
    monkeypatch.setattr(sys, "argv", [*words.split(), "--log_samples"])
    runner.main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["own_arc_easy"]["acc,none"]
    subject = sparity.load("zoo:llama", dtype="float32")
    assert found == run_tasks(subject, load_tokenizer("zoo:llama"), "arc_easy", Settings(data=data))[0].main.value


@pytest.mark.parametrize(
    ("names", "words"),
    [("arc_esy", 'did you mean "arc_easy"'), ("", "no task"), ("piqa,piqa", "twice"), ("wikitext", "hub:wikitext")],
)
def test_unknown_tasks_are_refused(names, words):
    with pytest.raises(InvalidInput, match=words):
        checked_tasks(names)


def test_files_that_are_not_there_are_named(model, tokenizer, data, monkeypatch):
    monkeypatch.delenv("SPARITY_DATA", raising=False)
    with pytest.raises(InvalidInput, match="SPARITY_DATA"):
        run_tasks(model, tokenizer, "arc_easy")
    with pytest.raises(InvalidInput, match=r"has no llm-foundry-eval/piqa\.jsonl"):
        run_tasks(model, tokenizer, "piqa", Settings(data=data))
    with pytest.raises(InvalidInput, match="tokenizer"):
        run_tasks(model, None, "arc_easy", Settings(data=data))


def test_scores_are_those_of_the_harness_s_own_model(model, tokenizer, data):
    """Its class for transformers models, with the softmax in float32 too: every log-probability, and what is greedy."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
    ours = SparityLM(model=model, tokenizer=tokenizer, batch_size=2)
    asked = [(f"{row['query']}\nAnswer:", f" {choice}") for row in ROWS for choice in row["choices"]]
    asked += [("", "The end of"), ("The with statement ", "is used"), ("x " * 30, "x")]
    requests = [Instance("loglikelihood", {}, each, 0) for each in asked]
    for (logprob, greedy), (own, is_greedy) in zip(
        theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests), strict=True
    ):
        assert own == pytest.approx(logprob, abs=1e-4)
        assert is_greedy == greedy
    text = [Instance("loglikelihood_rolling", {}, ("The with statement is used to wrap a block.",), 0)]
    assert ours.loglikelihood_rolling(text) == pytest.approx(theirs.loglikelihood_rolling(text, disable_tqdm=True))
    stop = [Instance("generate_until", {}, ("The with statement", {"until": ["."], "max_gen_toks": 10}), 0)]
    assert ours.generate_until(stop) == theirs.generate_until(stop, disable_tqdm=True)
