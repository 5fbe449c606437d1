"""The recipe: one file that says what is done to a model, how it is measured and what is accepted."""

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator

from sparity import registry
from sparity.checkpoints.stored_as import StoredAs, known_encoding
from sparity.errors import InvalidInput, wrong_input
from sparity.measure.tasks.names import is_task, own_tasks
from sparity.measure.tasks.section import TaskLimit, Tasks
from sparity.recipe_file import apply_override, read_recipe_file
from sparity.recipe_problems import explain
from sparity.sections import Number, Section, Spec, Whole
from sparity.stages import Stage
from sparity.stages.item import StageItem

MOST_SAMPLES, MOST_TOKENS, MOST_ROUNDS, MOST_AT_ONCE = 1_000_000, 1_000_000, 1000, 65_536
_NOT_DRAWN = ("tokens", "batch", "store")  # keys of calibration that mean something for given tokens too


class Calibration(Section):
    """The text that statistics are gathered on. Give `text` or `tokens`."""

    text: str | list[str] | dict[str, str] | None = Field(
        None, description="a file, a data set name[:split], a list of texts, or domains: a name for each of several"
    )
    tokens: str | None = Field(None, description="a .npy file of token ids [samples, length]")
    field: str = Field("text", description="the column of a jsonl, json, parquet file or data set")
    chat: bool = Field(False, description="rows are lists of messages: apply the model's chat template")
    documents: Literal["separate", "joined"] = Field(
        "separate", description="cut windows from single documents, or join"
    )
    samples: Whole = Field(128, ge=1, le=MOST_SAMPLES)
    length: Whole | None = Field(
        None, ge=2, le=MOST_TOKENS, description="tokens per sample; 2048, or the context if that is less"
    )
    seed: Whole = 0
    batch: Whole = Field(1, ge=1, description="sequences per forward pass")
    store: str | None = Field(None, description="a folder that keeps the dense model's statistics for other runs")

    @model_validator(mode="after")
    def _one_source(self) -> "Calibration":
        if (self.text is None) == (self.tokens is None):
            raise ValueError("give either `text` or `tokens`")
        drawing = {key: field for key, field in type(self).model_fields.items() if key not in _NOT_DRAWN}
        idle = [key for key, field in drawing.items() if getattr(self, key) != field.default]
        if self.tokens is not None and idle:
            raise ValueError(f"`tokens` is used as it is: leave out {', '.join(idle)}")
        if self.text == {}:
            raise ValueError("`text` names no domain: give a name and a source for each")
        return self


class Text(Section):
    """A text to measure on. Give `text` or `tokens`, or a `protocol` of the papers with its split as `text` or none."""

    text: str | list[str] | None = None
    tokens: str | None = None
    field: str = "text"
    name: str | None = None
    protocol: Literal["wikitext2", "c4", "ptb", "ptb-gptq"] | None = Field(None, description="how papers read it")

    @classmethod
    def named(cls, source: str, field: str = "text") -> "Text":
        """A text from one string: token ids when it ends in .npy."""
        return cls(tokens=source) if source.endswith(".npy") else cls(text=source, field=field)

    @model_validator(mode="after")
    def _one_source(self) -> "Text":
        if self.protocol is not None:
            if self.tokens is not None or isinstance(self.text, list) or self.field != "text":
                raise ValueError("with `protocol` only `text`, the file of its split, and `name` can be given")
        elif (self.text is None) == (self.tokens is None):
            raise ValueError("give either `text` or `tokens`")
        return self


class SpeedTest(Section):
    """Decode speed after a prompt, dense and sparse in turns."""

    prompt: Whole = Field(64, ge=1, le=MOST_TOKENS)
    tokens: Whole = Field(32, ge=1, le=MOST_TOKENS)
    rounds: Whole = Field(5, ge=1, le=MOST_ROUNDS)
    batch: list[Annotated[Whole, Field(ge=1, le=MOST_AT_ONCE)]] = Field(
        default_factory=lambda: [1],
        min_length=1,
        max_length=16,
        description="sequences at once; the first is the one that is judged",
    )

    @classmethod
    def fitting(cls, context: int | None) -> "SpeedTest":
        """The default test, or half a context and a quarter of one when it would not fit."""
        test = cls()
        if context is None or test.prompt + test.tokens <= context:
            return test
        return cls(prompt=max(context // 2, 1), tokens=max(context // 4, 1))


class Measure(Section):
    """What is measured, dense beside sparse."""

    perplexity: list[str | Text] = Field(default_factory=list, description="texts, or .npy files of 1-D token ids")
    window: Whole | None = Field(None, ge=2, description="tokens per window; 2048, or the context if that is less")
    windows: Whole | None = Field(None, ge=1, description="only the first so many windows of each text")
    speed: SpeedTest | None = Field(default_factory=SpeedTest)
    tasks: Tasks | None = Field(None, description="tasks for both models, a list of names or a mapping")
    layer_loss: bool = Field(False, description="the share of each projection's output that is lost; needs Gram sums")


def _relative(limit: str) -> str:
    if not re.fullmatch(r"\+?\d+(\.\d+)?%", limit):
        raise ValueError('write it as "+5%"')
    return limit


def _factor(limit: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?x", limit):
        raise ValueError('write it as "1.3x"')
    return limit


def _task_keys(schema: dict[str, Any]) -> None:
    """Name the tasks in the JSON schema of a section whose keys they may be."""
    limit = {"type": "string", "description": 'largest loss: "drop < 1 pt at 95 %"'}
    schema["properties"] |= dict.fromkeys(own_tasks(), limit)


class Accept(Section):
    """Limits that the result must keep on every text, and on tasks."""

    model_config = ConfigDict(json_schema_extra=_task_keys)

    perplexity: Annotated[str, AfterValidator(_relative)] | None = Field(None, description='largest rise: "+5%"')
    kl: Number | None = Field(None, ge=0, allow_inf_nan=False, description="largest KL to dense, nats per token")
    decode: Annotated[str, AfterValidator(_factor)] | None = Field(None, description='least decode speed-up: "1.3x"')
    tasks: dict[str, TaskLimit] = Field(
        default_factory=dict, description='by task: "drop < 1 pt at 95 %"; the names may stand among the other keys'
    )

    @model_validator(mode="before")
    @classmethod
    def _task_limits(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        named = {key: given[key] for key in given if is_task(key)}
        rest = {key: value for key, value in given.items() if key not in named}
        return {**rest, "tasks": {**rest.get("tasks", {}), **named}} if named else given


def _encodings(schema: dict[str, Any]) -> None:
    """Name the encodings in the JSON schema of a key that takes one."""
    schema["anyOf"][0]["enum"] = registry.names("encoding")


class Output(Section):
    """Where the result goes and in which layout."""

    path: str | None = None
    format: Literal["plain", "packed"] = Field(
        "plain", description="zeros stored, loads anywhere; or only what is kept"
    )
    values: Annotated[Spec, AfterValidator(known_encoding)] = Field(
        "same",
        description="of packed matrices: as they are, or an encoding that quantises",
        json_schema_extra=_encodings,
    )
    embeddings: Annotated[Spec, AfterValidator(known_encoding)] = Field(
        "same",
        description="of the embedding and the head: as they are, or an encoding that quantises",
        json_schema_extra=_encodings,
    )
    prefer: Literal["memory", "speed"] = Field(
        "memory", description="of packed matrices: the smallest format, or the fastest on this machine"
    )
    coding: Literal["none", "huffman"] = Field(
        "none", description="of packed matrices in the file: none, or a Huffman code where that takes fewer bytes"
    )
    matrices: dict[str, StoredAs] = Field(
        default_factory=dict, description="glob of packed matrices -> {format, values} in place of these"
    )

    @model_validator(mode="after")
    def _of_packed_matrices(self) -> "Output":
        for key in ("values", "embeddings", "prefer", "coding", "matrices"):
            if getattr(self, key) not in (type(self).model_fields[key].default, {}) and self.format != "packed":
                raise ValueError(f"`{key}: {getattr(self, key)}` needs `format: packed`")
        return self


class Recipe(Section):
    """Everything that one run does. Paths are relative to the current folder."""

    model: str | None = Field(
        None, description="a Hugging Face folder or name, a GGUF file, or zoo:llama, zoo:relu, zoo:moe, zoo:smollm2"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto keeps the checkpoint's")
    calibration: Calibration | None = None
    stages: list[Annotated[Stage, StageItem]] = Field(min_length=1)
    measure: Measure = Field(default_factory=Measure)
    accept: Accept = Field(default_factory=Accept)
    output: Output = Field(default_factory=Output)

    @model_validator(mode="after")
    def _limits_of_measured_tasks(self) -> "Recipe":
        asked = self.measure.tasks.names if self.measure.tasks else []
        for name in self.accept.tasks:
            if name not in asked:
                raise ValueError(f"accept.{name}: the task is not asked: add it to measure.tasks")
        return self

    @classmethod
    @wrong_input()
    def read(
        cls,
        recipe: "str | Path | Mapping[str, Any] | Recipe",
        overrides: list[str] | None = None,
        where: str = "recipe",
    ) -> "Recipe":
        """A checked recipe from a YAML file or a dictionary, with `a.b=c` overrides applied.

        `where` is what messages call a recipe that is no file.

        Raises:
            InvalidInput: an unknown key, a value of the wrong kind; the message names the place.
        """
        if isinstance(recipe, Recipe):
            content: Any = recipe.model_dump(exclude_unset=True)
        elif isinstance(recipe, Mapping):
            content = copy.deepcopy(dict(recipe))
        else:
            content, where = read_recipe_file(recipe), str(recipe)
        for override in overrides or ():
            apply_override(content, override)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise InvalidInput(explain(error, where, cls)) from error

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but where the result goes."""
        return _shortened(self.model_dump(mode="json", exclude={"output": {"path"}}))

    def summary(self) -> dict[str, Any]:
        """What the recipe sets, without defaults; texts given in memory are named by their hash."""
        return _shortened(self.model_dump(mode="json", exclude_unset=True))


def _shortened(content: dict[str, Any]) -> dict[str, Any]:
    """Lists of texts replaced by their number and hash."""
    short: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            short[key] = _shortened(value)
        elif key == "text" and isinstance(value, list):
            digest = hashlib.sha256("\0".join(value).encode(errors="surrogatepass")).hexdigest()
            short[key] = f"{len(value)} texts in memory, sha256 {digest[:16]}"
        elif isinstance(value, list):
            short[key] = [_shortened(item) if isinstance(item, dict) else item for item in value]
        else:
            short[key] = value
    return short
