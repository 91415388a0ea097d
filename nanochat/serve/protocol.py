"""OpenAI's interface as data: requests, and the parts of responses and streams.

Some fields are not OpenAI's: requests may set `top_k`, `min_p` and `repetition_penalty`. Answers
have `parts` (their text, tool calls and outputs), and streamed pieces of a call or its output come
as `delta.part`.
"""

import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nanochat.conversation import validate
from nanochat.errors import UserError
from nanochat.infer.requests import Completion, Event, Request
from nanochat.infer.sampling import SamplingParams
from nanochat.serve.service import ApiError, Job, Limits, Served


def _whole_text(value: Any) -> Any:
    """Replace lone surrogates, which JSON can contain and UTF-8 cannot, by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


Text = Annotated[str, BeforeValidator(_whole_text)]
SomeText = Annotated[Text, Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]
Neutral = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: Text


class Part(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "python", "python_output"]
    text: Text


class UserMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["user"]
    content: SomeText | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer"]
    content: Text | list[TextPart]


class AssistantMessage(BaseModel):
    """Message with an earlier answer: its `content`, or better its `parts`, with tool calls."""

    model_config = ConfigDict(strict=True)

    role: Literal["assistant"]
    content: Text | list[Part] | None = None
    parts: list[Part] | None = None
    tool_calls: Nothing | None = None
    function_call: None = None

    def said(self) -> list[dict[str, str]]:
        """List the parts that are not empty.

        An answer may be empty, and an untrained model may write outputs without a call.
        """
        parts = self.content if isinstance(self.content, list) else self.parts or []
        if isinstance(self.content, str):
            written = "".join(part.text for part in parts if part.type == "text")
            if not parts or written != self.content:  # the client edited only `content`
                parts = [Part(type="text", text=self.content)]
        kept: list[dict[str, str]] = []
        for part in parts:
            call = bool(kept) and kept[-1]["type"] == "python"
            if call if part.type == "python_output" else part.text:
                kept.append(part.model_dump())
        return kept


ChatMessage = Annotated[UserMessage | SystemMessage | AssistantMessage, Field(discriminator="role")]


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class SamplingFields(BaseModel):
    """Fields of both endpoints. Unknown fields are ignored. Known fields that the server does not
    support are refused, unless their value changes nothing."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    frequency_penalty: Neutral | None = None
    presence_penalty: Neutral | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    structured_outputs: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    grammar: None = None
    json_schema: None = None

    def params(self, limits: Limits, max_tokens: int, top_logprobs: int) -> SamplingParams:
        def chosen(value: Any, default: Any) -> Any:
            return default if value is None else value

        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        greedy = self.top_p == 0  # only the most likely token is left
        return SamplingParams(
            temperature=0.0 if greedy else chosen(self.temperature, limits.temperature),
            top_p=self.top_p or 1.0,
            top_k=max(0, chosen(self.top_k, limits.top_k)),
            min_p=chosen(self.min_p, 0.0),
            repetition_penalty=chosen(self.repetition_penalty, 1.0),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=stop,
            max_tokens=max_tokens,
            top_logprobs=top_logprobs,
        )


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _tools_not_to_be_called(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for choice, tools in (("tool_choice", "tools"), ("function_call", "functions")):
                if values.get(choice) == "none" and isinstance(values.get(tools), list):
                    values = {**values, tools: None}
        return values


class CompletionRequest(SamplingFields):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


def check_messages(messages: Sequence[ChatMessage], limits: Limits) -> dict[str, Any]:
    """Build the conversation; ApiError if it is too large or its roles make no sense.

    Empty messages of system and assistant are left out. The schema of conversations does not allow
    them, and clients send an empty answer back with the next request.
    """

    def wrong(words: str) -> ApiError:
        return ApiError(400, words, param="messages")

    if len(messages) > limits.max_messages:
        raise wrong(f"{len(messages)} messages are more than {limits.max_messages}")
    plain: list[dict[str, Any]] = []
    for message in messages:
        content: Any = message.content
        if isinstance(message, AssistantMessage):
            content = message.said()
        elif not isinstance(content, str):
            content = [part.model_dump() for part in content if part.text]
        if content or message.role == "user":
            role = "system" if message.role == "developer" else message.role
            plain.append({"role": role, "content": content})
    characters = sum(
        len(m["content"])
        if isinstance(m["content"], str)
        else sum(len(p["text"]) for p in m["content"])
        for m in plain
    )
    if characters > limits.max_characters:
        raise wrong(f"{characters} characters are more than {limits.max_characters}")
    if messages[-1].role == "assistant":
        raise wrong("the last message is the assistant's; end with the user's")
    conversation = {"messages": plain}
    try:
        validate(conversation, "messages")
    except UserError as error:
        raise wrong(str(error)) from None
    return conversation


def as_prompts(prompt: Any) -> list[str | list[int]]:
    """Make a list of prompts; each is text or token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


# Responses


def token_entries(served: Served, completion: Completion, start: int, end: int) -> list[Any]:
    """List the sampled ordinary tokens among ids[start:end] as OpenAI's chat logprobs."""
    tokenizer = served.engine.tokenizer
    ordinary = len(tokenizer.ranks)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.decode([token]),
            # JSON has no infinity, so the smallest value is OpenAI's.
            "logprob": max(logprob, -9999.0),
            "bytes": list(tokenizer.decode_bytes([token])),
        }

    entries = []
    for i in range(start, end):
        token = completion.ids[i]
        if completion.mask[i] and token < ordinary:
            best = completion.top_logprobs[i] if completion.top_logprobs else []
            top = [entry(*pair) for pair in best]
            entries.append({**entry(token, completion.logprobs[i]), "top_logprobs": top})
    return entries


def flat_logprobs(entries: list[Any], top: int, start: int = 0) -> dict[str, Any]:
    """Convert entries to the form of /v1/completions. start: characters before these tokens."""
    tokens = [entry["token"] for entry in entries]
    offsets = list(accumulate(map(len, tokens), initial=start))[:-1]
    return {
        "tokens": tokens,
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {best["token"]: best["logprob"] for best in entry["top_logprobs"]} for entry in entries
        ]
        if top
        else None,
        "text_offset": offsets,
    }


def usage(job: Job) -> dict[str, int]:
    prompt = sum(len(request.prompt) for request in job.requests)
    completion = sum(len(c.ids) for request in job.requests for c in request.completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event_line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Progress:
    """Number of tokens of each sample reported so far, for streamed log-probabilities."""

    def __init__(self, job: Job):
        self.served = job.served
        first = 0
        self.first: dict[Request, int] = {}
        for request in job.requests:
            self.first[request] = first
            first += len(request.completions)
        self.reported: Counter[int] = Counter()
        self.characters: Counter[int] = Counter()

    def index(self, event: Event) -> int:
        return self.first[event.request] + event.sample

    def entries(self, event: Event) -> list[Any]:
        index = self.index(event)
        start, self.reported[index] = self.reported[index], event.tokens
        return token_entries(self.served, event.completion, start, event.tokens)

    def flat_logprobs(self, event: Event, top: int) -> dict[str, Any]:
        index = self.index(event)
        found = flat_logprobs(self.entries(event), top, self.characters[index])
        self.characters[index] += sum(map(len, found["tokens"]))
        return found


async def chat_chunks(
    job: Job, head: dict[str, Any], logprobs: bool, want_usage: bool
) -> AsyncIterator[str]:
    """Yield the lines of a streamed chat completion."""
    progress = _Progress(job)
    extra = {"usage": None} if want_usage else {}

    def line(index: int, delta: dict[str, Any], entries: Any, reason: str | None) -> str:
        found = {"content": entries, "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return event_line({**head, "choices": [choice], **extra})

    for index in range(job.samples):
        yield line(index, {"role": "assistant", "content": ""}, [], None)
    try:
        async for events in job.events():
            if not events:
                yield ": waiting\n\n"
            for event in merged(events):
                index = progress.index(event)
                entries = progress.entries(event) if logprobs else None
                if event.finished:
                    yield line(index, {}, entries, event.completion.finish_reason)
                elif event.type == "text":
                    yield line(index, {"content": event.text}, entries, None)
                else:
                    part = {"type": event.type, "text": event.text}
                    yield line(index, {"content": "", "part": part}, entries, None)
    except ApiError as error:
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    if want_usage:
        yield event_line({**head, "choices": [], "usage": usage(job)})
    yield "data: [DONE]\n\n"


async def completion_chunks(
    job: Job, head: dict[str, Any], logprobs: int | None, want_usage: bool
) -> AsyncIterator[str]:
    """Yield the lines of a streamed text completion."""
    progress = _Progress(job)
    extra = {"usage": None} if want_usage else {}
    try:
        async for events in job.events():
            if not events:
                yield ": waiting\n\n"
            for event in merged(events):
                entries = None
                if logprobs is not None:
                    entries = progress.flat_logprobs(event, logprobs)
                reason = event.completion.finish_reason if event.finished else None
                text = event.text if event.type == "text" else ""
                choice = {
                    "index": progress.index(event),
                    "text": text,
                    "logprobs": entries,
                    "finish_reason": reason,
                }
                yield event_line({**head, "choices": [choice], **extra})
    except ApiError as error:
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    if want_usage:
        yield event_line({**head, "choices": [], "usage": usage(job)})
    yield "data: [DONE]\n\n"


def merged(events: list[Event]) -> list[Event]:
    """Join consecutive pieces of one part, so that a slow client gets fewer, longer events."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if (
            last is not None
            and not (last.finished or event.finished)
            and (last.request, last.sample, last.type) == (event.request, event.sample, event.type)
        ):
            text = last.text + event.text
            result[-1] = Event(event.request, event.sample, event.type, text, event.tokens, False)
        else:
            result.append(event)
    return result
