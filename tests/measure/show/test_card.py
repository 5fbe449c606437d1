import re
from dataclasses import replace

import pytest
import yaml

from sparity.measure.show.card import model_card


def split(card):
    """Front matter as data, and the text after it."""
    empty, head, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def test_front_matter(report):
    head, _ = split(model_card(report, report.candidates[0]))
    assert head == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparity", "sparse", "pruned"],
    }


@pytest.mark.parametrize("model", ["/data/model", "./model", "model", "a/b/c", "a/b: c", "https://x/y", "../m"])
def test_a_name_that_is_not_on_the_hub_is_no_base_model(report, model):
    head, body = split(model_card(replace(report, model=model), report.candidates[0]))
    assert "base_model" not in head
    assert model in body


def test_card_says_what_was_done_and_what_it_cost(report):
    _, body = split(model_card(report, report.candidates[0]))
    assert body.startswith("\n# Qwen/Qwen2.5-0.5B, 50.2 % sparse\n")
    assert "50.2 % of the weights in 168 projections are zero (target 50.0 %), 36.2 % of all parameters." in body
    assert "\nOne stage: wanda, unstructured.\n" in body
    assert "The weight files take 988.1 MB (as before)." in body
    assert "The run took 12 min 05 s on 8 threads, with 262,144 tokens of calibration text" in body
    assert "| wikitext-2 | 2,048 | 13.07 | 15.19 | +16.2 % (poor) | 0.1523 | 80.1 % |" in body


def test_card_calls_a_slow_down_slower_and_keeps_the_notes(report):
    _, body = split(model_card(report, report.candidates[0]))
    assert "Decoding is slower than dense: 0.87x" in body
    assert r"| decode, tokens/s | 9.12 \[8.80-9.40\] | 7.93 \[7.66-8.18\] | 0.87x, slower |" in body
    assert f"\n> {report.candidates[0].notes[0]}\n" in body
    assert body.index(report.candidates[0].notes[0]) < body.index("## What was done")


def test_card_of_one_of_several_speaks_of_that_one(seven):
    _, body = split(model_card(seven, seven.candidates[6]))
    assert "Decoding is faster than dense: 1.31x" in body
    assert "score: two-of-four" in body
    assert "wanda" not in body


def test_smaller_files_are_stated(report):
    packed = replace(report.candidates[0], bytes_sparse=520_000_000)
    assert "The weight files take 520.0 MB (988.1 MB before)." in model_card(report, packed)


def test_card_says_what_was_not_measured(report):
    bare = replace(report.candidates[0], quality=(), speed=None, verdicts=())
    _, body = split(model_card(report, bare))
    assert "Quality was not measured." in body
    assert "Speed was not measured." in body
    assert "Acceptance" not in body


def test_verdicts(report):
    _, body = split(model_card(report, report.candidates[0]))
    assert "| decode 1.3x | 0.87x | missed |" in body
    assert "| perplexity +20% | +16.2% | pass |" in body


def test_recipe_is_readable_yaml(report):
    _, body = split(model_card(report, report.candidates[0]))
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL).group(1)) == report.candidates[0].recipe


def test_loading_code_compiles(report):
    _, body = split(model_card(report, report.candidates[0]))
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL).group(1)
    compile(code, "card", "exec")
    assert "AutoModelForCausalLM.from_pretrained(name" in code


def test_hostile_names_stay_text(hostile):
    head, body = split(model_card(hostile, hostile.candidates[0]))
    assert set(head) == {"library_name", "pipeline_tag", "tags"}
    prose, recipe = re.split(r"(?m)^`{4}yaml\n", body)  # the fence is longer than the one inside the recipe
    assert "<script" not in prose
    assert "\n# not a heading" not in body
    assert r"| a\|b \[x\](http://e.com) | 2,048 |" in prose
    assert yaml.safe_load(recipe.split("````")[0]) == hostile.candidates[0].recipe


def test_dense_on_our_kernels_has_rows_of_its_own(on_engine):
    card = model_card(on_engine, on_engine.candidates[0])
    line = "| decode, tokens/s, dense on our kernels | 15.8 \\[15.5-16.0\\] | 23.7 \\[23.0-24.1\\] | 1.50x, faster |"
    assert line in card
    assert "| time to first token, dense in transformers | 850 ms" in card


@pytest.mark.parametrize(
    ("kind", "title", "tags"),
    [
        ("pruned", "50.0 % sparse", ["sparse", "pruned"]),
        ("cut", "88.0 % of the parameters left", ["pruned"]),
        ("skipping", "41.0 % skipped at run time", ["sparse", "activation-sparsity"]),
        ("quantised", "4.57 bits per weight", ["quantized"]),
        ("healed", "no weight removed or skipped", []),
        ("nothing", "no weight removed or skipped", []),
        (
            "all",
            "50.0 % sparse, 88.0 % of the parameters left, 40.6 % skipped at run time",
            ["sparse", "pruned", "activation-sparsity"],
        ),
    ],
)
def test_title_and_tags_fit_what_was_done(kinds, kind, title, tags):
    head, body = split(model_card(kinds[kind], kinds[kind].candidates[0]))
    assert body.splitlines()[1] == f"# Qwen/Qwen2.5-0.5B, {title}"
    assert head["tags"] == ["sparity", *tags]


def test_packed_values_of_another_type_are_quantised(report):
    packed = replace(report.candidates[0], recipe={"output": {"format": "packed", "values": "int8"}})
    head, body = split(model_card(report, packed))
    assert head["tags"] == ["sparity", "sparse", "pruned", "quantized"]
    assert "```python\nimport sparity  # reads the packed weights\n" in body


def test_what_was_done_lists_the_stages_and_the_file_of_kept_indices(kinds):
    _, body = split(model_card(kinds["all"], kinds["all"].candidates[0]))
    done = body[body.index("## What was done") : body.index("## Quality")]
    assert [line for line in done.splitlines() if line][1:4] == [
        "50.0 % of the weights in 8 projections are zero (target 50.0 %), 25.0 % of all parameters that are left. "
        "6 projections are smaller: 352 of 400 parameters are left. "
        "40.6 % of the input channels of 8 projections are skipped at run time (target 40.0 %).",
        "`kept_indices.json` says which of the dense model's channels, heads and blocks are left.",
        "3 stages, one after the other: wanda, 50%; 25 % of the channels; thresholds, 40 %.",
    ]
    assert "kept_indices" not in model_card(kinds["pruned"], kinds["pruned"].candidates[0])


def test_loading_needs_sparity_where_something_is_done_at_run_time(kinds):
    candidate = kinds["all"].candidates[0]
    _, body = split(model_card(kinds["all"], candidate))
    assert "```python\nimport sparity  # attaches what is done at run time\n" in body
    assert "Done at run time: activations. `sparity.load(name, runtime=False)` gives the model without it.\n" in body
    packed = replace(candidate, recipe={"output": {"format": "packed"}})
    both = "import sparity  # reads the packed weights and attaches what is done at run time\n"
    assert both in model_card(kinds["all"], packed)
    assert "sparity.load" not in model_card(kinds["cut"], kinds["cut"].candidates[0])
    assert "import sparity" not in model_card(kinds["cut"], kinds["cut"].candidates[0])


def test_it_lists_what_was_copied_from_the_dense_model(report):
    names = ("LICENSE", "additional_chat_templates/tool_use.jinja", "NOTICE [x](y)")
    _, body = split(model_card(report, report.candidates[0], names))
    assert "## From the dense model" in body
    assert "\n- LICENSE\n- additional_chat_templates/tool_use.jinja\n- NOTICE \\[x\\](y)\n" in body
    assert "From the dense model" not in model_card(report, report.candidates[0])
