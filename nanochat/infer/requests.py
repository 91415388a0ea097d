"""What the engine takes and gives: requests, completions, events."""

from dataclasses import dataclass, field
from typing import Literal

from nanochat.infer.sampling import SamplingParams


@dataclass
class Completion:
    """One sample; it grows while `finish_reason` is None."""

    ids: list[int] = field(default_factory=list)
    """All tokens after the prompt, the terminal one included."""
    mask: list[int] = field(default_factory=list)
    """1 where the model's sample decided, 0 where a tool's output was forced."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each sampled token under the distribution it was drawn from (at
    temperature 0: under the plain softmax); 0.0 for forced tokens."""
    finish_reason: Literal["stop", "length"] | None = None
    parts: list[dict[str, str]] = field(default_factory=list)
    """The content of an assistant message: text, python and python_output parts."""
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    """Per token, the most likely (id, log-probability) pairs, if they were asked for."""

    @property
    def text(self) -> str:
        """What the assistant says, without tool calls, their output and special tokens."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def written(self) -> str:
        """What the assistant says, with its tool calls and their output in brackets."""
        return "".join(
            part["text"] if part["type"] == "text" else f"[{part['type']}: {part['text']}]"
            for part in self.parts
        )


@dataclass(eq=False)
class Request:
    """A prompt in the engine; `Engine.submit` returns it as the handle."""

    prompt: list[int]
    params: SamplingParams
    index: int
    """Names the random stream, with the sample's index and the seed."""
    completions: list[Completion]
    streaming: bool = False
    max_tokens: int = 0
    """The smaller of what was asked for and what the context leaves."""

    @property
    def finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.completions)


@dataclass(frozen=True)
class Event:
    """News of one sample: some text (for streaming requests), or that it is finished."""

    request: Request
    sample: int
    type: str
    """text, python or python_output: what `text` is a piece of."""
    text: str
    """Never half a character nor the beginning of a stop string."""
    tokens: int
    """`completion.ids[:tokens]` have been seen when this text was complete."""
    finished: bool

    @property
    def completion(self) -> Completion:
        return self.request.completions[self.sample]
