"""Train the models of the zoo, from a corpus of four domains.

python tools/train_zoo.py relu moe --corpus ../shared/corpus --tokenizer ../shared/tokenizer-8k

A run is cut off safely at any time and goes on when the command is given again, with bit-identical results on the same
machine, versions and number of threads (it says which of them differ). The rate is constant after a short warm-up and
falls linearly to nought in the last `--decay-steps`. `echo 300 > RUNS/relu-cpu-0/cooldown` lets a run end in 300 steps:
it equals one that was started with the `--steps` and `--decay-steps` that its log then names.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel

import zoo_card
import zoo_data
import zoo_probes
import zoo_start
from zoo_loss import loss_of
from zoo_muon import Muon
from zoo_plans import PLANS, Plan

SAVE_EVERY = 50
LOOK_EVERY = 200


@dataclass
class State:
    """Where a run stands: what a checkpoint holds beside weights and momenta."""

    steps: int
    decay_steps: int
    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0

    def rate(self, warm_up: int) -> float:
        """The share of the full learning rate at this step."""
        return min(1.0, (self.step + 1) / warm_up, (self.steps - self.step) / self.decay_steps)

    def long(self) -> bool:
        """Whether contexts are long: at every fourth step, and in the second half of the decay."""
        return self.step % 4 == 3 or self.steps - self.step <= self.decay_steps // 2


def build(config: PretrainedConfig, device: str, seed: int) -> PreTrainedModel:
    """The stock transformers model of a configuration, in float32, drawn at random."""
    torch.manual_seed(seed)
    # On a CPU a loop over experts is the quickest by far; on a GPU the grouped product is.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if config.model_type == "mixtral":
        model.set_experts_implementation("grouped_mm" if device == "cuda" else "eager")
    return model.to(device).train()


def optimizers(model: PreTrainedModel, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for embeddings, routers, norms and biases."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embed" not in name and not name.endswith(".gate.weight")  # of a router
        (matrices if matrix else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, plan.matrix_rate), adamw]


def train(plan: Plan, texts: zoo_data.Texts, run: Path, state: State, device: str, seed: int) -> PreTrainedModel:
    """Train to the end of the schedule; goes on from the run's checkpoint, if there is one. `state` is advanced."""
    run.mkdir(parents=True, exist_ok=True)
    model = build(plan.config, device, seed)
    if plan.start:
        source = transformers.AutoModelForCausalLM.from_pretrained(plan.start, dtype=torch.float32)
        zoo_start.begin_from(model, source.to(device), seed)
    if plan.config.model_type == "opt":
        zoo_start.place(model)
    movers = optimizers(model, plan)
    resume(run, model, movers, state, device)
    # Compiling pays on a GPU; not for experts, whose shapes change with the data.
    compiled = device == "cuda" and plan.config.model_type != "mixtral"
    trunk = torch.compile(model.base_model, dynamic=False) if compiled else model.base_model
    began, before = time.process_time(), state.cpu_seconds
    while state.step < state.steps:
        cool_down(run, state)
        lesson = plan.lesson(state.step, state.long())
        ids = torch.from_numpy(texts.batch(seed, state.step, *lesson)).to(device)
        parts = ids.split(max(1, plan.at_once * plan.context // ids.shape[1]))
        loss = 0.0
        for part in parts:
            with torch.autocast(device, torch.bfloat16):
                part_loss = loss_of(model, trunk, part) / len(parts)
            part_loss.backward()
            loss += part_loss.item()
        for mover, rate in zip(movers, (plan.matrix_rate, plan.other_rate), strict=True):
            for group in mover.param_groups:
                group["lr"] = rate * state.rate(plan.warm_up)
            mover.step()
            mover.zero_grad()
        state.step += 1
        state.tokens += ids.numel()
        state.cpu_seconds = before + time.process_time() - began
        if state.step % 10 == 0:
            note(run, state, loss=round(loss, 4))
        if state.step % LOOK_EVERY == 0 or state.step == state.steps:
            note(run, state, valid=zoo_probes.perplexities(model, texts, "valid", plan.context, windows=12))
        if state.step % SAVE_EVERY == 0 or state.step == state.steps:
            save(run, model, movers, state)
    return model


def note(run: Path, state: State, **what: Any) -> None:
    """A line of progress, on the terminal and in the run's log."""
    time_of_day = time.strftime("%H:%M:%S")
    line = {"time": time_of_day, **asdict(state), "cpu_seconds": round(state.cpu_seconds, 1), **what}
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    speed = state.tokens / max(state.cpu_seconds, 1e-9)
    print(
        f"{time_of_day} {run.name} step {state.step}/{state.steps}, {state.tokens:,} tokens, {speed:.0f}/cpu-s: {what}",
        flush=True,
    )


def cool_down(run: Path, state: State) -> None:
    """Follow a request to end early: the file `cooldown` with the number of steps that are left."""
    request = run / "cooldown"
    if request.exists() and state.steps - state.step < state.decay_steps:
        request.unlink()
        note(
            run, state, told="to end early, but the rate falls already: no schedule from the start would give the same"
        )
    elif request.exists():
        state.decay_steps = int(request.read_text())
        state.steps = state.step + state.decay_steps
        request.unlink()
        note(run, state, told=f"equals --steps {state.steps} --decay-steps {state.decay_steps}")


def save(run: Path, model: PreTrainedModel, movers: list[torch.optim.Optimizer], state: State) -> None:
    """Write the checkpoint whole or not at all."""
    new = run / "checkpoint.new"
    content = {"model": model.state_dict(), "movers": [mover.state_dict() for mover in movers], "state": asdict(state)}
    with new.open("wb") as file:
        torch.save({**content, "circumstances": circumstances()}, file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(run / "checkpoint.pt")


def resume(run: Path, model: PreTrainedModel, movers: list[torch.optim.Optimizer], state: State, device: str) -> None:
    """Take up the run's checkpoint, if there is one."""
    if not (run / "checkpoint.pt").exists():
        return
    content = torch.load(run / "checkpoint.pt", map_location=device, weights_only=True)
    model.load_state_dict(content["model"])
    for mover, saved in zip(movers, content["movers"], strict=True):
        mover.load_state_dict(saved)
    for name, value in content["state"].items():
        setattr(state, name, value)
    differs = {
        key: (old, circumstances()[key]) for key, old in content["circumstances"].items() if old != circumstances()[key]
    }
    note(run, state, resumed="bit-identical" if not differs else f"not bit-identical: {differs}")


def circumstances() -> dict[str, str | int]:
    """What the bits of a result depend on."""
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def export(model: PreTrainedModel, tokenizer: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Write a Hugging Face folder with weights in bf16, and `training.json`; an old folder gives way at the end."""
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    model.bfloat16().save_pretrained(new)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tokenizer / name, new / name)
    (new / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def arguments() -> argparse.Namespace:
    """What the command line says; what cannot be used ends the program with a line that says why."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("models", nargs="*", default=list(PLANS["cpu"]), help="llama, relu, moe (default: all)")
    cli.add_argument("--corpus", type=Path, required=True, help="folder of books, web, code and math .tar.xz")
    cli.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    cli.add_argument("--size", choices=PLANS, default="gpu" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--steps", type=positive, help="instead of the plan's")
    cli.add_argument("--decay-steps", type=positive, help="instead of the plan's")
    cli.add_argument("--runs", type=Path, default=Path("zoo-runs"), help="where token files and checkpoints lie")
    cli.add_argument("--output", type=Path, default=Path("zoo"), help="where the models go")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--threads", type=positive, default=1)
    cli.add_argument(
        "--report",
        action="store_true",
        help="train nothing: measure the models, and write the cards of those that have a training.json again",
    )
    args = cli.parse_args()
    for name in args.models:
        if name not in PLANS[args.size]:
            cli.error(f"no model {name!r} (models: {', '.join(PLANS[args.size])})")
        if args.report and not (args.output / name / "config.json").is_file():
            cli.error(f"{args.output / name} holds no model: leave out --report to train it")
    needed = [*(args.corpus / f"{name}.tar.xz" for name in zoo_data.MIX), args.tokenizer / "tokenizer.json"]
    for file in needed:
        if not file.is_file():
            cli.error(
                f"{file} does not exist: --corpus is a folder of {', '.join(zoo_data.MIX)} .tar.xz, "
                "--tokenizer one of tokenizer.json"
            )
    return args


def positive(given: str) -> int:
    """A whole number from 1."""
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given} is not a whole number from 1")
    return int(given)


def main() -> None:
    """Train the named models one after the other, and write their cards."""
    args = arguments()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.models:
        plan, folder = PLANS[args.size][name], args.output / name
        encoder = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        texts = zoo_data.Texts(zoo_data.prepare(args.corpus, args.tokenizer, args.runs, plan.tokens), encoder)
        if not args.report:
            state = State(args.steps or plan.steps, args.decay_steps or plan.decay_steps)
            model = train(plan, texts, args.runs / f"{name}-{args.size}-{args.seed}", state, device, args.seed)
            started = plan.start.name if plan.start else None
            facts = {"model": name, "size": args.size, "seed": args.seed, "started_from": started, **asdict(state)}
            facts["recall"] = round(plan.asked(state.steps), 4)
            export(model, args.tokenizer, folder, {**facts, **circumstances()})
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        figures = zoo_probes.measure(model, texts)
        print(json.dumps(asdict(figures), indent=2))
        if (folder / "training.json").exists():
            facts = json.loads((folder / "training.json").read_text())
            (folder / "README.md").write_text(zoo_card.card(facts, figures, model.config))


if __name__ == "__main__":
    main()
