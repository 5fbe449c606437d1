"""Training: every architecture learns, runs resume bit for bit, and what is written loads in stock transformers."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_zoo
import zoo_card
import zoo_data
import zoo_loss
import zoo_probes
from train_zoo import State
from zoo_plans import PLANS

ARCHITECTURES = ("llama", "relu", "moe")


class CutOff(Exception):
    pass


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_toy_learns_more_than_how_often_words_occur(texts, tmp_path, name):
    plan = PLANS["toy"][name]
    state = State(plan.steps, plan.decay_steps)
    model = train_zoo.train(plan, texts, tmp_path, state, "cpu", seed=0).eval()
    assert 0.9e6 < sum(weight.numel() for weight in model.parameters()) < 1.1e6
    reached = zoo_probes.perplexities(model, texts, "test", 128, 8)
    for domain, value in reached.items():
        ids = texts.tokens(domain, "test")[: 8 * 128]
        bound = zoo_probes.unigram_perplexity(texts.tokens(domain, "train"), ids, 8192)
        print(f"{name}, {domain}: {value:.0f}, by frequency {bound:.0f}")
        assert value < bound
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["valid"].keys() == zoo_data.MIX.keys()
    assert state.tokens == plan.steps * 4 * 128


def run(texts, folder, name, steps=6, decay=4):
    state = State(steps, decay)
    model = train_zoo.train(PLANS["toy"][name], texts, folder, state, "cpu", seed=0)
    return model.state_dict(), state


@pytest.mark.parametrize("name", ["relu", "moe"])
def test_a_run_that_is_cut_off_resumes_bit_for_bit(texts, tmp_path, monkeypatch, name):
    whole, state = run(texts, tmp_path / "whole", name)
    monkeypatch.setattr(train_zoo, "SAVE_EVERY", 2)
    batch = zoo_data.Texts.batch

    def cut(self, seed, step, *shape):
        if step == 5:
            raise CutOff
        return batch(self, seed, step, *shape)

    monkeypatch.setattr(zoo_data.Texts, "batch", cut)
    with pytest.raises(CutOff):
        run(texts, tmp_path / "cut", name)
    monkeypatch.setattr(zoo_data.Texts, "batch", batch)
    resumed, again = run(texts, tmp_path / "cut", name)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (again.step, again.tokens) == (state.step, state.tokens)
    assert '"step": 4, ' in (tmp_path / "cut/log.jsonl").read_text()
    assert '"resumed": "bit-identical"' in (tmp_path / "cut/log.jsonl").read_text()


def test_a_checkpoint_is_written_whole_or_not_at_all(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(train_zoo, "SAVE_EVERY", 2)
    save = torch.save

    def break_off(content, file):
        if content["state"]["step"] > 2:
            file.write(b"half")
            raise CutOff
        save(content, file)

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(CutOff):
        run(texts, tmp_path, "relu")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["step"] == 2


def test_resuming_says_what_differs(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(train_zoo, "circumstances", lambda: {"torch": "2.13", "threads": 1})
    run(texts, tmp_path, "relu", steps=2)
    monkeypatch.setattr(train_zoo, "circumstances", lambda: {"torch": "2.13", "threads": 7})
    run(texts, tmp_path, "relu", steps=2)
    assert "not bit-identical: {'threads': (1, 7)}" in (tmp_path / "log.jsonl").read_text()


def test_an_early_end_equals_a_run_that_was_planned_so(texts, tmp_path):
    planned, _ = run(texts, tmp_path / "planned", "relu", steps=3, decay=3)
    (tmp_path / "told").mkdir()
    (tmp_path / "told/cooldown").write_text("3\n")
    told, state = run(texts, tmp_path / "told", "relu", steps=50, decay=20)
    assert state.step == 3
    assert all(torch.equal(planned[key], told[key]) for key in planned)
    assert "equals --steps 3 --decay-steps 3" in (tmp_path / "told/log.jsonl").read_text()
    assert not (tmp_path / "told/cooldown").exists()


def test_an_early_end_is_refused_once_the_rate_falls(texts, tmp_path):
    planned, _ = run(texts, tmp_path / "planned", "relu", steps=3, decay=4)
    (tmp_path / "told").mkdir()
    (tmp_path / "told/cooldown").write_text("9\n")
    told, state = run(texts, tmp_path / "told", "relu", steps=3, decay=4)
    assert state.step == 3
    assert all(torch.equal(planned[key], told[key]) for key in planned)
    assert "the rate falls already" in (tmp_path / "told/log.jsonl").read_text()


def test_the_rate_warms_up_stays_and_falls_to_nought():
    def rates(*steps):
        return [State(1000, 200, step=step).rate(50) for step in steps]

    assert rates(0, 24, 49, 500, 800, 900, 999) == pytest.approx([0.02, 0.5, 1, 1, 1, 0.5, 0.005])


def test_embeddings_routers_norms_and_biases_go_to_adamw():
    for name in ARCHITECTURES:
        model = train_zoo.build(PLANS["toy"][name].config, "cpu", 0)
        muon, adamw = train_zoo.optimizers(model, PLANS["toy"][name])
        names = {id(weight): key for key, weight in model.named_parameters()}
        chosen = [names[id(weight)] for weight in muon.param_groups[0]["params"]]
        left = [names[id(weight)] for weight in adamw.param_groups[0]["params"]]
        assert len(chosen) + len(left) == len(names)
        assert all(any(part in key for part in ("attn", "mlp", "fc1", "fc2")) for key in chosen)
        assert not any("gate.weight" in key or "norm" in key or key.endswith("bias") for key in chosen)
        assert all(any(part in key for part in ("embed", "norm", "bias", ".gate.weight")) for key in left)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_and_its_gradients_are_those_of_transformers(name, monkeypatch):
    monkeypatch.setattr(zoo_loss, "ROWS", 20)  # the 62 predictions are not a multiple
    config = copy.deepcopy(PLANS["toy"][name].config)
    config.num_hidden_layers = 1  # where balance of all layers is that of each
    model = train_zoo.build(config, "cpu", 0)
    ids = torch.randint(1, 8192, (2, 32), generator=torch.Generator().manual_seed(0))
    options = {"output_router_logits": True} if name == "moe" else {}
    expected = model(input_ids=ids, labels=ids, **options).loss
    expected.backward()
    gradients = {key: weight.grad.clone() for key, weight in model.named_parameters()}
    model.zero_grad()
    loss = zoo_loss.loss_of(model, model.base_model, ids)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-3)  # the head multiplies in bf16
    for key, weight in model.named_parameters():
        near = 1e-7 + 0.02 * gradients[key].abs().max().item()  # 1e-7: a key's bias has no gradient
        torch.testing.assert_close(weight.grad, gradients[key], rtol=0.05, atol=near)


def routed(*pairs):
    """Router scores of 16 tokens, which take these pairs of eight experts in turn."""
    logits = torch.zeros(16, 8)
    for token in range(16):
        logits[token, list(pairs[token % len(pairs)])] = 9.0
    return logits


def test_experts_are_balanced_in_every_layer():
    """Two layers that each use one half of the experts use all of them together, and must cost more than even use."""
    config = PLANS["toy"]["moe"].config
    model = train_zoo.build(config, "cpu", 0)
    even = routed((0, 1), (2, 3), (4, 5), (6, 7))
    halves = [routed((0, 1), (2, 3)), routed((4, 5), (6, 7))]

    def cost(layers):
        hidden = torch.zeros(1, 16, config.hidden_size)
        out = SimpleNamespace(last_hidden_state=hidden, router_logits=tuple(layers))
        return zoo_loss.loss_of(model, lambda **_: out, torch.zeros(1, 16, dtype=torch.long)).item()

    assert cost([even, even]) == pytest.approx(math.log(8192) + 2 * config.router_aux_loss_coef, abs=0.02)
    assert cost(halves) == pytest.approx(cost([even, even]) + 2 * config.router_aux_loss_coef, abs=0.01)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_loads_in_stock_transformers_and_has_a_card(texts, tokenizer, tmp_path, name):
    model = train_zoo.build(PLANS["toy"][name].config, "cpu", 0)
    weights = {key: value.bfloat16() for key, value in model.state_dict().items()}
    facts = {"model": name, "size": "toy", "seed": 0, "started_from": None, "steps": 1, "decay_steps": 1, "tokens": 9}
    facts |= {"cpu_seconds": 1.0, "recall": 0.07, **train_zoo.circumstances()}
    train_zoo.export(model, tokenizer, tmp_path / name, facts)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in weights.items())
    assert AutoTokenizer.from_pretrained(tmp_path / name).decode([44, 45]) == texts.encoder.decode([44, 45])
    assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == 0
    figures = zoo_probes.measure(loaded.float(), texts, windows=1, context=64, asked=2)
    card = zoo_card.card(facts, figures, loaded.config)
    assert "GSM8K train, MAWPS and AQuA dev are training text" in card
    assert f"{figures.parameters:,} parameters" in card
    assert ("Zeros in what enters `fc2`" in card) == (name == "relu")
    assert ("Use of the experts" in card) == (name == "moe")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["rellu"], "no model 'rellu' (models: llama, relu, moe)"),
        (["relu", "--corpus", "nowhere"], "nowhere/books.tar.xz does not exist: --corpus is a folder of books, web"),
        (["relu", "--tokenizer", "nowhere"], "nowhere/tokenizer.json does not exist"),
        (["relu", "--steps", "0"], "argument --steps: 0 is not a whole number from 1"),
        (["relu", "--decay-steps", "-1"], "argument --decay-steps: -1 is not a whole number from 1"),
        (["relu", "--report", "--output", "nowhere"], "nowhere/relu holds no model: leave out --report"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line(corpus, tokenizer, monkeypatch, capsys, given, said):
    good = ["--corpus", str(corpus), "--tokenizer", str(tokenizer)]
    monkeypatch.setattr("sys.argv", ["train_zoo.py", *good, *given])
    with pytest.raises(SystemExit) as ended:
        train_zoo.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
