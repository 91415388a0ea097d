"""Requests, completions and events: input and output of the engine."""

from dataclasses import dataclass, field
from typing import Literal

from nanochat.infer.sampling import SamplingParams


@dataclass
class Completion:
    """One sample; it grows while `finish_reason` is None."""

    ids: list[int] = field(default_factory=list)
    """All tokens after the prompt, including the one that ends the sample."""
    mask: list[int] = field(default_factory=list)
    """Mask of `ids`: 1 for tokens that were sampled, 0 for those of a tool's output."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each sampled token under the distribution it was drawn from (at
    temperature 0: under the plain softmax); 0.0 for tokens of a tool's output."""
    finish_reason: Literal["stop", "length"] | None = None
    parts: list[dict[str, str]] = field(default_factory=list)
    """Content of an assistant message: text, python and python_output parts."""
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    """Most likely (id, log-probability) pairs of each token, if the request asked for them."""

    @property
    def text(self) -> str:
        """Text of the assistant, without tool calls, their output and special tokens."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def written(self) -> str:
        """Text of the assistant, with its tool calls and their output in brackets."""
        return "".join(
            part["text"] if part["type"] == "text" else f"[{part['type']}: {part['text']}]"
            for part in self.parts
        )


@dataclass(eq=False)
class Request:
    """A prompt in the engine; `Engine.submit` returns it, and `Engine.cancel` takes it."""

    prompt: list[int]
    params: SamplingParams
    index: int
    """Number of the prompt; with the sample's number and the seed it gives the random stream."""
    completions: list[Completion]
    streaming: bool = False
    max_tokens: int = 0
    """Longest completion: that of `params`, or less if the context leaves less room."""

    @property
    def finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.completions)


@dataclass(frozen=True)
class Event:
    """New text of one sample (for streaming requests), or its end."""

    request: Request
    sample: int
    type: str
    """Type of the message part that `text` belongs to: text, python or python_output."""
    text: str
    """New text, without half a character or the beginning of a stop string at its end."""
    tokens: int
    """Number of the completion's tokens that had been decoded when this text was complete."""
    finished: bool

    @property
    def completion(self) -> Completion:
        return self.request.completions[self.sample]
