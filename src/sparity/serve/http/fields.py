"""The fields of requests: their types and bounds, and what is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = list[Whole]
UNSUPPORTED = {  # fields of OpenAI's interface that would change the answer: value that changes nothing, and what to do
    "response_format": ({"type": "text"}, "answers are text: ask for the form in the prompt, and check what comes"),
    "tools": ([], "this server calls no tools"),
    "tool_choice": ("none", "this server calls no tools"),
    "parallel_tool_calls": (True, "this server calls no tools"),
    "functions": ([], "this server calls no functions"),
    "function_call": ("none", "this server calls no functions"),
    "suffix": ("", "text is only added at the end"),
    "best_of": (1, "ask for n answers and choose"),
    "modalities": (["text"], "answers are text"),
    "audio": (None, "answers are text"),
    "prediction": (None, "leave it out: the answer is the same"),
    "reasoning_effort": (None, "models are served as they are"),
    "verbosity": (None, "models are served as they are"),
    "web_search_options": (None, "this server looks nothing up"),
    "store": (False, "nothing is stored"),
    "metadata": ({}, "nothing is stored"),
    "service_tier": ("auto", "all requests are served alike"),
}


class Fields(BaseModel):
    """What no request may go beyond."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Fields):
    """Of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Answering(Fields):
    """What completions and chat have in common; the second half is vLLM's."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Annotated[str, Field(max_length=1000)] | list[Annotated[str, Field(max_length=1000)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    max_tokens: Whole | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = 1.0
    min_tokens: Whole | None = 0
    ignore_eos: bool | None = False
    stop_token_ids: Annotated[Tokens, Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = False
    return_tokens_as_token_ids: bool | None = False


class CompletionFields(Answering):
    """POST /v1/completions."""

    prompt: str | Tokens | list[str] | list[Tokens]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """One message of a conversation; the last fields come back from answers, and are empty here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        said = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return said | ({"name": self.name} if self.name is not None else {})


class ChatFields(Answering):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeFields(Fields):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeFields(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
