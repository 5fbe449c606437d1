"""Whether the result of a recipe will load in another program, by what, and what it gains there; nothing is run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sparity.errors import InvalidInput, suggestion
from sparity.measure.show import numbers
from sparity.models import Decoder
from sparity.models.gguf_writer import declines_gguf
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.plan import Plan
from sparity.stages import RuntimeStage

TARGETS = ("transformers", "llama.cpp", "vllm")
EVERYWHERE = frozenset(
    ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox")
)
KNOWN = {"llama.cpp": EVERYWHERE, "vllm": EVERYWHERE | {"opt"}}  # kinds of models, as their configurations call them
OTHER_HEADS = frozenset(("llama", "mistral", "mixtral", "qwen3", "qwen3_moe"))  # a head's width need not be a quotient
ROWS = {"Q8_0, Q4_0 and Q4_1": 32, "the K quantisations": 256}  # of llama.cpp: what a row is cut into
STORED = "zeros are stored and computed like other numbers there"


@dataclass(frozen=True)
class Outlook:
    """A recipe's result in another program.

    Attributes:
        target: the program.
        loads: "yes"; "no"; "unknown" where nobody here has tried that kind of model.
        how: by what it is loaded.
        reasons: why it does not load as it is, or what is lost.
        notes: what else matters there.
        bytes_before: of the dense model's weights.
        bytes_after: of the weights that are read there.
        about: whether those are an estimate, since blocks will differ.
    """

    target: str
    loads: Literal["yes", "no", "unknown"]
    how: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    about: bool

    @property
    def gain(self) -> float:
        """How many times as fast reading the weights, and so a decoding step of one sequence, can be at most."""
        return self.bytes_before / self.bytes_after

    @property
    def words(self) -> str:
        """All of it, in sentences."""
        verdict = {"yes": "loads", "no": "does not load", "unknown": "not known"}[self.loads]
        lines = [f"{self.target}: {verdict}{f', {self.how}' if self.how else ''}"]
        lines += [f"  {reason}" for reason in (*self.reasons, *self.notes)]
        if self.loads != "no":
            sizes = f"{numbers.size(self.bytes_after)} of weights in place of {numbers.size(self.bytes_before)}"
            gain = f"decoding at most {self.gain:.2f}x" if self.gain >= 1.01 else "no gain in speed"
            lines.append(f"  {'about ' if self.about else ''}{sizes}: {gain}")
        return "\n".join(lines)


def check_target(target: str | None) -> None:
    """Raise `InvalidInput` for a program that is none of `TARGETS`."""
    if target is not None and target not in TARGETS:
        raise InvalidInput(f"--target {target}: one of {', '.join(TARGETS)}{suggestion(target, TARGETS)}")


def outlook(job: Job, plan: Plan, target: str) -> Outlook:
    """Whether the planned result will load in `target`, and what it gains; weights in the recipe's type."""
    last = job.stages[-1]
    final = last.stage.after(last.model, last.draft)
    ragged = any(each.stage.ragged for each in job.stages)
    loads, how, reasons = _loading(job, final, ragged, target)
    width = job.decoder.dtype.itemsize
    before = sum(_count(shape) for shape in job.decoder.source.shapes().values()) * width
    after = plan.stages[-1].parameters * width
    if any(each.stage.zeros_lie is not None for each in job.stages) and "packed" not in how:
        reasons = (*reasons, STORED)
    notes = tuple(_rows(final)) if target == "llama.cpp" and loads != "no" else ()
    return Outlook(target, loads, how, reasons, notes, before, after, ragged)


def _loading(
    job: Job, final: Decoder, ragged: bool, target: str
) -> tuple[Literal["yes", "no", "unknown"], str, tuple[str, ...]]:
    config, packed = final.config, job.recipe.output.format == "packed"
    reasons = []
    if any(isinstance(each.stage, RuntimeStage) for each in job.stages):
        runtime = ", ".join(each.stage.name for each in job.stages if isinstance(each.stage, RuntimeStage))
        if target == "transformers":
            return "yes", "after `import sparity`", (f"the run-time stages ({runtime}) are attached by Sparity",)
        reasons.append(f"the run-time stages ({runtime}) are Sparity's own: weights only are loaded")
    if target == "transformers":
        if ragged:
            why = "transformers keeps `per_layer_config` but builds all blocks from one size"
            return "no", "sparity.load opens it", (why,)
        return ("yes", "packed, after `import sparity`", ()) if packed else ("yes", "", ())
    if config.model_type not in KNOWN[target]:
        return "unknown", "", (f'whether {target} runs models of type "{config.model_type}" is not known here',)
    if target == "vllm":
        if ragged:
            return "no", "", (*reasons, "vLLM builds all blocks of this architecture from one size: shapes: uniform")
        if packed:
            return "yes", "packed, on the processor, by Sparity's plug-in (docs/integrations/vllm.md)", tuple(reasons)
    if ragged:
        if reason := declines_gguf(config):
            return "no", "", (*reasons, f"blocks of different sizes go to llama.cpp as `deci`, but {reason}")
        return "yes", "as a GGUF file of architecture deci: sparity convert OUT OUT.gguf", tuple(reasons)
    if reason := _unusual_heads(config, final.family.head_width(config)):
        return "unknown", "", (*reasons, reason)
    if target == "vllm":
        return "yes", "", tuple(reasons)
    how = "as a GGUF file: " + (
        "llama.cpp's convert_hf_to_gguf.py" if declines_gguf(config) else "sparity convert OUT OUT.gguf"
    )
    if packed:
        reasons.append("packed weights are written as the dense ones that they stand for")
    return "yes", how, tuple(reasons)


def _unusual_heads(config: Any, width: int) -> str | None:
    if config.model_type in OTHER_HEADS or width * config.num_attention_heads == config.hidden_size:
        return None
    return (
        f'heads of {width} that do not make up the hidden size of {config.hidden_size}, in a model of type "'
        f'{config.model_type}", have not been tried there: cut mlp_channels or depth'
    )


def _rows(model: Decoder) -> Iterator[str]:
    """Which quantisations of llama.cpp cannot hold some rows."""
    sites = [site for index in range(len(model)) for site in model.sites(index)]
    lengths = {site.projections[0].weight.shape[1] for site in sites}
    for kinds, block in ROWS.items():
        unfit = sorted(length for length in lengths if length % block)
        if unfit:
            said = ", ".join(map(str, unfit))
            yield f"rows of {said} are no multiple of {block}: {kinds} leave those matrices larger"


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
