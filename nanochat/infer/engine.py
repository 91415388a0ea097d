"""Engine: batched decoding for the command line, the server, evaluations and RL.

B rows, T time, V vocabulary

Requests wait in a queue. A prompt is read once, in chunks, into a small cache of its own, which is
then copied into one row per sample. Rows have no gaps between them, so a step reads each weight
once for all rows and computes nothing for missing ones. When a row has finished, the next request
gets its place at once (continuous batching, as in Orca, OSDI 2022).

Every sample has a random stream of its own, a pure function of (seed, prompt index, sample index,
step). A sample therefore depends neither on the other rows nor on their number, except for the
rounding of matrix products of different shapes.

A row that is alone is read several tokens at a time: the token drawn last, and a guess of what
follows it (`Row.guess`). Each token is drawn as always, from the logits of its own position. Tokens
are kept up to the first one that differs from the guess, and the cache forgets the rest
(speculative decoding with n-grams of the text itself, arXiv 2304.04487). The answer is the same as
without guesses, again except for the rounding of products of different shapes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import cast

import torch

from nanochat.data.order import make_key
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.infer.decoder import Decoder
from nanochat.infer.requests import Completion, Event, Request
from nanochat.infer.rows import Prefill, Row, Slots, start_prefill
from nanochat.infer.sampling import Sampler, SamplingParams
from nanochat.infer.transcript import Transcript
from nanochat.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer
from nanochat.tools.tool import Tool, calculator_tool

TOOL_OUTPUT_CHARACTERS = 2000
"""Largest number of tokens of a tool's output; the rest is cut off, as it takes up the context."""


class Engine:
    """Decodes for one model. It is not thread-safe: all calls must come from one thread.

    model: a GPT or a Decoder. A Decoder is made of a GPT whenever an idle engine gets work, so the
    GPT may be trained between two calls. A subclass of GPT decodes by its own `next_logits`.
    max_slots: number of rows decoded at once.
    tools: True for the calculator, False for none, or a `Tool`. Any tool but the calculator runs in
    a thread while other rows go on.
    prefill_tokens: prompt tokens read between two decoding steps. A smaller number makes streams
    smoother, a larger one reads prompts faster.
    """

    def __init__(
        self,
        model: GPT | Decoder,
        tokenizer: Tokenizer,
        *,
        max_slots: int = 32,
        tools: bool | Tool = True,
        prefill_tokens: int = 512,
    ):
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"{model.config.vocab_size}: load the tokenizer the model was trained with"
            )
        if max_slots < 1 or prefill_tokens < 1:
            raise UserError(
                f"max_slots {max_slots} and prefill_tokens {prefill_tokens} must be at least 1"
            )
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.prefill_tokens = prefill_tokens
        self.context_length = model.config.context_length
        self.vocab_size = model.config.vocab_size
        self.device = model.device
        self._model = model if type(model) is GPT else None
        self._decoder: GPT | Decoder | None = None if type(model) is GPT else model
        self._tool: Tool | None = calculator_tool if tools is True else tools or None
        self._executor: ThreadPoolExecutor | None = None
        self._waiting: deque[Request] = deque()
        self._prefill: Prefill | None = None
        fixed = getattr(model, "compiled_step", None) is not None
        few_shapes = self.device.type != "cpu"
        self._slots = Slots(max_slots, self.context_length, self._new_cache, few_shapes, fixed)
        self._rows = self._slots.rows  # the same list object, never replaced
        self._sampler: Sampler | None = None
        self._special = {tokenizer.special(n): n for n in tokenizer.SPECIAL_TOKENS}
        self._terminal = {tokenizer.special(n) for n in ("<|assistant_end|>", "<|bos|>")}
        self._output = tuple(tokenizer.special(f"<|output_{edge}|>") for edge in ("start", "end"))
        self.prompt_tokens = 0
        """Number of prompt tokens read so far, over all requests."""
        self.completion_tokens = 0
        """Number of tokens decoded so far, over all requests."""

    # Interface

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        num_samples: int = 1,
        indices: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Decode `num_samples` completions of each prompt; returns them in the prompts' order.

        params: one for all prompts, or one per prompt. indices: numbers of the prompts' random
        streams, by default their places in the list. A process that decodes a part of a larger list
        passes the places in that list, so that samples do not depend on how it was divided.
        """
        requests: list[Request | None] = [None] * len(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts) or (indices is not None and len(indices) != len(prompts)):
            raise ValueError("params and indices must have one entry per prompt")
        # The longest prompts come first: prompts read together then have similar lengths, and no
        # long one is left to run alone at the end.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        try:
            for i in order:
                index = i if indices is None else indices[i]
                requests[i] = self.submit(prompts[i], params[i], num_samples, index)
            while not all(request.finished for request in requests if request):
                self.step()
        except BaseException:
            for request in requests:
                if request is not None:
                    self.cancel(request)
            raise
        return [request.completions for request in requests if request]

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        num_samples: int = 1,
        index: int = 0,
    ) -> Iterator[Event]:
        """Yield events of one prompt's samples; closing the iterator cancels the rest."""
        request = self.submit(prompt, params, num_samples, index, streaming=True)
        try:
            while not request.finished:
                yield from (event for event in self.step() if event.request is request)
        finally:
            self.cancel(request)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        num_samples: int = 1,
        index: int = 0,
        streaming: bool = False,
    ) -> Request:
        """Queue a prompt; `step()` does the work. Raises UserError as `prepare` does."""
        request = self.prepare(prompt, params, num_samples, index, streaming)
        self.enqueue(request)
        return request

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        num_samples: int = 1,
        index: int = 0,
        streaming: bool = False,
    ) -> Request:
        """Check a prompt without queueing it yet; any thread may do this.

        Raises UserError for a prompt that is empty, has unknown ids or leaves no room in the
        context for a single token.
        """
        params = params or SamplingParams()
        prompt = [int(i) for i in prompt]
        if not prompt:
            raise UserError("the prompt is empty; it needs at least the <|bos|> token")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise UserError(f"the prompt has ids outside of 0 to {self.vocab_size - 1}")
        if num_samples < 1:
            raise UserError(f"num_samples {num_samples} must be at least 1")
        room = self.context_length - len(prompt)
        if room < 1:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer in the context of "
                f"{self.context_length}; shorten it, or extend the model with mid_train "
                "--context-length"
            )
        return Request(
            prompt,
            params,
            index,
            [Completion() for _ in range(num_samples)],
            streaming,
            min(params.max_tokens, room),
        )

    def enqueue(self, request: Request) -> None:
        """Queue a prepared request."""
        self._waiting.append(request)

    def step(self) -> list[Event]:
        """Read a chunk of waiting prompts, if there is room for them, and decode one token per row.

        A row that is alone may get several tokens, if they were guessed right.

        Returns what happened: text of streaming requests, and the end of every sample.
        """
        events: list[Event] = []
        with torch.inference_mode():
            self._read_prompts(events)
            self._decode(events)
        if self.idle:
            self._free()
        return events

    def cancel(self, request: Request) -> None:
        """Remove a request; nothing happens if it is finished or unknown."""
        if request in self._waiting:
            self._waiting.remove(request)
        if self._prefill is not None:
            self._prefill.drop(request)
            if not self._prefill.samples:
                self._prefill = None
        if any(row.request is request for row in self._rows):
            with torch.inference_mode():
                self._keep([row.request is not request for row in self._rows])
        if self.idle:
            self._free()

    def reset(self) -> None:
        """Remove all requests, also after a `step()` that failed."""
        self._waiting.clear()
        self._prefill = self._sampler = None
        self._rows.clear()
        self._free()

    @property
    def idle(self) -> bool:
        return not (self._rows or self._waiting or self._prefill)

    @property
    def num_rows(self) -> int:
        """Number of samples being decoded."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prompt has not been read yet."""
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory held by key/value caches."""
        prefill = self._prefill  # read once, since the server calls this from another thread
        caches = (self._slots.cache, prefill.cache if prefill else None)
        return sum(cache.nbytes for cache in caches if cache is not None)

    # The loop

    def _decoder_now(self) -> GPT | Decoder:
        """Return the decoder; an idle engine that gets work makes it of the present weights."""
        if self._decoder is None:
            assert self._model is not None
            self._decoder = Decoder(self._model)
        return self._decoder

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        return self._decoder_now().new_cache(rows, capacity)

    def _free(self) -> None:
        self._slots.free()
        if self._model is not None:
            self._decoder = None

    def _read_prompts(self, events: list[Event]) -> None:
        if self._prefill is None and self._waiting and self._slots.available:
            self._prefill = start_prefill(
                self._waiting,
                self._slots.available,
                self.prefill_tokens,
                self._new_cache,
                self.device,
            )
        prefill = self._prefill
        if prefill is None:
            return
        if not prefill.done:
            prefill.read(self._decoder_now().next_logits, self.prefill_tokens)
            if not prefill.done:
                return
            self.prompt_tokens += sum(len(request.prompt) for request in prefill.requests)
        self._place(prefill, events)
        if not prefill.samples:
            self._prefill = None

    def _place(self, prefill: Prefill, events: list[Event]) -> None:
        """Give free rows to samples whose prompt has been read, and draw their first tokens."""
        count = min(len(prefill.samples), self._slots.available)
        if count == 0:
            return
        taken = [prefill.samples.popleft() for _ in range(count)]
        rows = []
        for which, sample in taken:
            request = prefill.requests[which]
            transcript = Transcript(self.tokenizer, request.params.stop)
            request.completions[sample].parts = transcript.parts
            key = make_key(request.params.seed, request.index, sample)
            rows.append(Row(request, sample, transcript, key, len(request.prompt)))
        sources = [which for which, _ in taken]
        waiting = len(prefill.samples)
        waiting += sum(len(request.completions) for request in self._waiting)
        self._slots.add(rows, prefill.cache, sources, waiting)
        assert prefill.logits is not None
        self._sampler = None
        self._draw(prefill.logits[torch.tensor(sources, device=self.device)], rows, events)
        self._drop_finished()

    def _decode(self, events: list[Event]) -> None:
        for row in self._rows:
            if row.tool is not None and row.tool.done():
                self._force(row, row.tool)
        rows = self._rows
        if not rows:
            return
        paused = [row.tool is not None for row in rows]
        if all(paused):
            if self._prefill is None and not self._waiting:
                # The wait is short, since the caller may want to submit or cancel.
                tools = [row.tool for row in rows if row.tool]
                wait(tools, timeout=0.05, return_when=FIRST_COMPLETED)
            return
        decoder = self._decoder_now()
        guess = rows[0].guess(getattr(decoder, "guesses", 0)) if len(rows) == 1 else []
        self._slots.reserve(0, len(guess))
        cache = self._slots.view()
        if guess:
            self._decode_guess(guess, cache, events)
            return
        # The cache may have rows that are not in use.
        unused = cache.batch_size - len(rows)
        ids = torch.tensor([[row.next_id] for row in rows] + [[0]] * unused).to(self.device)
        counts = None
        if unused or any(paused):
            counts = torch.tensor([1 - p for p in paused] + [0] * unused).to(self.device)
        logits = decoder.next_logits(ids, cache, counts)
        for row, waits in zip(rows, paused, strict=True):
            row.position += not waits
        self._draw(logits[: len(rows)], rows, events)
        self._drop_finished()

    def _decode_guess(self, guess: list[int], cache: KVCache, events: list[Event]) -> None:
        """Read the only row's next token and a guess; append tokens up to the first wrong one."""
        (row,) = self._rows
        decoder = cast(Decoder, self._decoder_now())
        ids = [row.next_id, *guess]
        logits = decoder.logits_after_each(torch.tensor([ids]).to(self.device), cache)[0]
        first = len(row.completion.ids)
        drawn = self._sampler_of(self._rows).draw(logits, [*range(first, first + len(ids))])
        kept = 0
        for token, logprob, top in zip(*drawn, strict=True):
            self._append(row, token, logprob, top, events)
            kept += 1
            ended = row.completion.finish_reason is not None or row.tool is not None
            if ended or ids[kept : kept + 1] != [row.next_id]:
                break
        row.position += kept
        cache.take_back(len(ids) - kept, ids[kept - 1])
        self._drop_finished()

    def _sampler_of(self, rows: list[Row]) -> Sampler:
        """Return a sampler of these rows; that of all rows is kept while they stay the same."""
        if rows is self._rows and self._sampler is not None:
            return self._sampler
        sampler = Sampler(
            [row.request.params for row in rows],
            [row.key for row in rows],
            self.vocab_size,
            self.device,
            lambda i: rows[i].history,
        )
        if rows is self._rows:
            self._sampler = sampler
        return sampler

    def _draw(self, logits: torch.Tensor, rows: list[Row], events: list[Event]) -> None:
        """Choose the next token of every row from its logits (len(rows), V) and append it."""
        sampler = self._sampler_of(rows)
        drawn = sampler.draw(logits, [len(row.completion.ids) for row in rows])
        for row, token, logprob, top in zip(rows, *drawn, strict=True):
            if row.tool is None:
                self._append(row, token, logprob, top, events)
        sampler.see([row.next_id for row in rows])

    def _append(
        self,
        row: Row,
        token: int,
        logprob: float,
        top: list[tuple[int, float]],
        events: list[Event],
    ) -> None:
        """Append a token that was drawn, or the next one of a tool's output in its place."""
        if row.forced:
            self._accept(row, row.forced.popleft(), 0.0, 0)
        else:
            self._accept(row, token, logprob, 1)
        count = row.request.params.top_logprobs
        if count:
            row.completion.top_logprobs.append(top[:count] if row.completion.mask[-1] else [])
        self._report(row, events)

    def _accept(self, row: Row, token: int, logprob: float, mask: int) -> None:
        completion, transcript = row.completion, row.transcript
        completion.ids.append(token)
        completion.mask.append(mask)
        completion.logprobs.append(logprob)
        row.next_id = token
        self.completion_tokens += 1
        name = self._special.get(token)
        if name is None:
            transcript.feed(token)
        elif token in self._terminal:
            completion.finish_reason = "stop"
        elif name == "<|python_start|>":
            transcript.switch("python")
        elif name == "<|output_start|>":
            transcript.switch("python_output")
        elif name in ("<|python_end|>", "<|output_end|>") and transcript.type != "text":
            called = name == "<|python_end|>" and transcript.type == "python"
            transcript.end()
            if called:
                self._call(row, transcript.parts[-1]["text"])
            transcript.switch("text")
        if transcript.stopped:
            completion.finish_reason = "stop"
        elif completion.finish_reason is None and len(completion.ids) >= row.request.max_tokens:
            completion.finish_reason = "length"
        if completion.finish_reason is not None:
            transcript.end()

    def _call(self, row: Row, source: str) -> None:
        """Start the tool; its output's tokens follow when it has finished."""
        if self._tool is None or len(row.completion.ids) >= row.request.max_tokens:
            return
        row.tool = Future()
        if self._tool is calculator_tool:
            row.tool.set_result(calculator_tool(source))
            self._force(row, row.tool)
        else:
            self._executor = self._executor or ThreadPoolExecutor(4, "tool")
            row.tool = self._executor.submit(self._tool, source)

    def _force(self, row: Row, result: Future[str]) -> None:
        error = result.exception()
        output = f"error: {str(error) or type(error).__name__}" if error else result.result()
        start, end = self._output
        row.forced.extend((start, *self.tokenizer.encode(output[:TOOL_OUTPUT_CHARACTERS]), end))
        row.tool = None

    def _report(self, row: Row, events: list[Event]) -> None:
        """Add events for new text and for the end of a sample."""
        finished = row.completion.finish_reason is not None
        pieces = row.transcript.take()
        tokens = len(row.completion.ids)
        if row.request.streaming:
            for kind, text in pieces:
                events.append(Event(row.request, row.sample, kind, text, tokens, False))
        if finished:
            events.append(Event(row.request, row.sample, "text", "", tokens, True))

    def _drop_finished(self) -> None:
        keep = [row.completion.finish_reason is None for row in self._rows]
        if not all(keep):
            self._keep(keep)

    def _keep(self, keep: list[bool]) -> None:
        self._slots.keep(keep)
        self._sampler = None
