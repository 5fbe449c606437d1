"""The specification's own usage, executed: the page shows it as it is written there, and names what runs each line."""

import re
from pathlib import Path

import pytest
import torch

import sparity
from documents import ROOT, blocks, rows, section
from sparity.integrations import sagellm
from sparity.integrations.sagellm.performance import comparison

PAGE = ROOT / "docs/integrations/sagellm.md"
EXAMPLES, JOINT, NODE = blocks(PAGE, "python")
MODEL = "Qwen/Qwen2.5-14B"
QUICK = {"rounds": 1, "prompt": 8, "tokens": 2}

BENCHMARK = """
def benchmark_sparsity(model_path: str, config: SparsityConfig):
    dense_model = load_model(model_path)
    dense_metrics = measure_performance(dense_model)

    sparse_mgr = SparsityManager(config)
    sparse_model_path = sparse_mgr.prune(model_path, config)
    sparse_model = sparse_mgr.load_sparse_model(sparse_model_path, config)
    sparse_metrics = measure_performance(sparse_model)

    report = {
        "sparsity_ratio": sparse_mgr.verify_sparsity(sparse_model_path),
        "speedup_decode": sparse_metrics["tpot"] / dense_metrics["tpot"],
        "speedup_prefill": sparse_metrics["ttft"] / dense_metrics["ttft"],
        "ppl_delta": sparse_metrics["ppl"] - dense_metrics["ppl"],
        "memory_saving": (dense_metrics["mem"] - sparse_metrics["mem"]) / dense_metrics["mem"],
    }
    return report
"""


def executed(text, **names):
    exec(compile(text, str(PAGE), "exec"), names)
    return names


def weights(path):
    model = sparity.load(path)
    return {name: layer.weight for name, layer in model.named_modules() if name.endswith("_proj")}


def test_the_four_examples(here):
    found = executed(EXAMPLES)
    manager, pruned = found["manager"], found["sparse_model_path"]
    targets = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    for name, weight in weights(pruned).items():
        kept = (weight.view(-1, 4) != 0).sum(1)
        assert bool((kept <= 2).all()) == name.endswith(targets), name
    assert found["report"]["avg_sparsity"] == 0.5
    assert {"speedup", "perplexity_delta", "memory_saving"} < found["report"].keys()
    stats = found["sparsity_stats"]
    assert {name for name, share in stats.items() if share} == {f"layer.{i}.{name}" for i in (0, 1) for name in targets}
    second = manager.verify_sparsity(manager.prune("meta-llama/Llama-3-8B", found["config_sparsegpt"]))
    assert len(second) == 14
    assert all(share == pytest.approx(0.5, abs=1e-3) for share in second.values())
    dynamic = manager.load_sparse_model(pruned, found["config_dynamic"])
    assert (dynamic.threshold, dynamic.path) == (0.1, pruned)
    for name, weight in weights(manager.prune(MODEL, found["config_joint"])).items():
        assert (weight.view(-1, 4) != 0).sum(1).max() <= 2, name
        assert max(len(group.unique()) for group in weight.view(-1, 64)) <= 16, name


def test_joint_sparse_quant(here):
    path = executed(JOINT)["joint_sparse_quant"](MODEL)
    assert path == sagellm.joint_sparse_quant(MODEL)  # the function that is ours finds it done
    for name, weight in weights(path).items():
        assert (weight.view(-1, 4) != 0).sum(1).max() <= 2, name
        assert weight.count_nonzero() > 0.4 * weight.numel(), name


def test_the_ir_node():
    found = executed(NODE)
    assert found["node_config"] == sagellm.SparsityConfig(pattern="n:m", n=2, m=4)
    assert found["node_kernel"] == "cuda_sparse_nm_kernel"


def test_the_specifications_benchmark(here):
    """Its code with our functions, and ours: what does not depend on the clock is the same."""
    config = sagellm.SparsityConfig()
    names = {name: getattr(sagellm, name) for name in ("SparsityConfig", "SparsityManager", "load_model")}
    theirs = executed(BENCHMARK, measure_performance=sagellm.measure_performance, **names)["benchmark_sparsity"]
    specified, ours = theirs(MODEL, config), sagellm.benchmark_sparsity(MODEL, config, speed=QUICK)
    assert specified.keys() == ours.keys()
    for key in ("sparsity_ratio", "ppl_delta", "memory_saving"):
        assert specified[key] == ours[key]
    assert all(report[key] > 0 for report in (specified, ours) for key in ("speedup_decode", "speedup_prefill"))


def test_speed_ups_are_above_1_where_sparse_is_faster():
    dense = {"ttft": 3.0, "tpot": 0.2, "ppl": 10.0, "mem": 100.0}
    sparse = {"ttft": 2.0, "tpot": 0.1, "ppl": 11.0, "mem": 60.0}
    assert comparison(dense, sparse, {}) == {
        "sparsity_ratio": {},
        "speedup_decode": 2.0,
        "speedup_prefill": 1.5,
        "ppl_delta": 1.0,
        "memory_saving": 0.4,
    }


def test_every_test_that_the_page_names_exists():
    listed = rows(section(PAGE.read_text(), "## The specification, line by line"))[2:]
    named = {name for row in listed for name in re.findall(r"`(test_\w+)`", row[2])}
    files = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    written = set(re.findall(r"^def (test_\w+)", files, re.MULTILINE))
    assert len(listed) > 20
    assert named <= written
    assert [row[0] for row in listed if not re.search(r"`test_", row[2])] == ["MMLU"]


def test_the_page_names_every_field():
    table = rows(section(PAGE.read_text(), "## What a configuration means"))[2:]
    named = [field for row in table for field in re.findall(r"`(\w+)`", row[0])]
    assert named == list(vars(sagellm.SparsityConfig()))


def test_the_bytes_of_csr_and_of_the_smallest_are_those_that_the_page_gives():
    from sparity.formats import build_format

    shape, dense = (4096, 4096), 2 * 4096**2
    sizes = [build_format(name).nbytes(shape, 4096**2 // 2, torch.bfloat16) / dense for name in ("csr", "bitmask")]
    assert [round(size, 2) for size in sizes] == [1.5, 0.56]
