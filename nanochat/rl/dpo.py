"""Direct preference optimisation (DPO, arXiv 2305.18290): pairs, their store, their loss weights.

P pairs; document 2i of a store is pair i's chosen answer, document 2i + 1 the rejected one

The reference is the model that training began with. An answer's margin m is its log-probability
minus its log-probability under the reference. The loss of a pair is
-log sigmoid(beta (m_chosen - m_rejected)). It has the same gradient as sum(w nll), the objective of
all stages, with w = beta sigmoid(-beta (m_chosen - m_rejected)) on the tokens of the chosen answer,
and -w on those of the rejected one.
"""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nanochat import conversation, paths
from nanochat.config import RlConfig
from nanochat.data.files import parse_json
from nanochat.data.order import MixtureOrder
from nanochat.data.store import StoreWriter, TokenStore
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.rl.rollouts import RowStream, sum_over_ranks
from nanochat.rl.rows import Rows, Sample, pack_samples, score
from nanochat.rl.start import Start
from nanochat.runtime import Runtime
from nanochat.stage import Stage
from nanochat.tokenizer import SystemStyle, Tokenizer, pack_mask
from nanochat.train import StepStats, train_step

VERSION = 2


def encode_pair(
    line: bytes, where: str, tokenizer: Tokenizer, max_tokens: int, system: SystemStyle
) -> list[tuple[list[int], list[int], list[int]]]:
    """Encode a pair as (ids, mask, roles) of the chosen and of the rejected answer.

    The mask is 1 on the answer only; roles are those of `Tokenizer.render_roles`.

    Raises UserError for a line that is not a pair, and for one longer than `max_tokens`.
    """
    try:
        pair = parse_json(line, first=True)
    except UserError as error:
        raise UserError(f"{where}: {error}; write one JSON object per line") from None
    if not isinstance(pair, dict) or not {"messages", "chosen", "rejected"} <= pair.keys():
        shown = str(pair)[:60]
        raise UserError(f"{where}: expected an object with messages, chosen, rejected; got {shown}")
    conversation.validate({"messages": pair["messages"]}, where, last_role="user")
    prompt = {"messages": pair["messages"]}
    before = len(tokenizer.render_for_completion(prompt, system))
    documents = []
    for key in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": pair[key]}
        full = {"messages": [*pair["messages"], answer]}
        conversation.validate(full, f"{where}, {key}")
        ids, mask, roles = tokenizer.render_roles(full, system=system)
        if len(ids) > max_tokens:
            raise UserError(
                f"{where}: with its {key} answer it has {len(ids)} tokens, the context takes "
                f"{max_tokens}; shorten it, or leave such lines out with --bad-rows skip"
            )
        documents.append((ids, [0] * before + mask[before:], roles))
    if documents[0] == documents[1]:
        raise UserError(f"{where}: chosen and rejected are equal; there is nothing to prefer")
    return documents


def pairs_store(
    path: Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    system: SystemStyle = "tokens",
    bad_rows: Literal["error", "skip"] = "error",
) -> TokenStore:
    """Encode the pairs of a file into a store under `stores_dir()`, reused while nothing changes.

    Raises UserError for a file that cannot be read, for bad lines and for a file without pairs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--pairs {path} cannot be read ({error}); give a .jsonl file with lines like "
            '{"messages": [...], "chosen": "...", "rejected": "..."}'
        ) from error
    content = hashlib.sha256(data).hexdigest()
    settings = json.dumps([content, max_tokens, system, bad_rows, VERSION])
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    digest = hashlib.sha256((tokenizer.hash + fingerprint).encode()).hexdigest()[:10]
    folder = paths.stores_dir() / f"pairs-{digest}"
    store = TokenStore.open_if_current(folder, tokenizer.hash, fingerprint)
    if store is not None:
        store.verify_once()
        return store
    skipped: list[str] = []
    with StoreWriter(
        folder,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        fingerprint=fingerprint,
        with_mask=True,
    ) as writer:
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                where = f"{path.name} line {number}"
                documents = encode_pair(line, where, tokenizer, max_tokens, system)
            except UserError as error:
                if bad_rows == "error":
                    raise
                skipped.append(str(error))
                continue
            for ids, mask, roles in documents:
                writer.add(ids, pack_mask(mask, roles))
        if writer.num_documents == 0:
            first = f"; the first of {len(skipped)} bad lines: {skipped[0]}" if skipped else ""
            raise UserError(f"--pairs {path} holds no pair{first}")
        writer.extra["skipped"] = skipped
    return TokenStore.open(folder, tokenizer.hash)


@dataclass(frozen=True)
class AnswerPairs:
    """A store of pairs with the reference's log-probabilities."""

    store: TokenStore
    reference: torch.Tensor
    """Log-probability of each answer under the reference, (documents,) float64."""

    def __len__(self) -> int:
        return len(self.store) // 2

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """List the samples of some pairs: chosen and rejected answer of each pair in turn."""
        stored = ((self.store.ids(d), self.store.mask(d)) for d in answers_of(indices))
        return [Sample(ids.tolist(), mask.tolist()) for ids, mask in stored if mask is not None]


def answers_of(indices: Sequence[int]) -> list[int]:
    """Documents of some pairs: chosen and rejected answer of each pair in turn."""
    return [document for i in indices for document in (2 * i, 2 * i + 1)]


def with_reference(store: TokenStore, model: GPT, name: str, runtime: Runtime) -> AnswerPairs:
    """Score every answer with the model's present weights; keep the result in the store's folder.

    `name` identifies the weights; a result saved under that name is reused. Every rank must call
    this, and scores a part.
    """
    path = store.folder / f"reference-{name}.npy"
    known = None
    if runtime.is_main and path.is_file():
        with suppress(OSError, ValueError, EOFError):
            known = np.load(path, allow_pickle=False)
        if known is not None and known.shape != (len(store),):
            known = None
    known = runtime.broadcast_object(known)
    if known is not None:
        return AnswerPairs(store, torch.from_numpy(known))
    pairs = AnswerPairs(store, torch.zeros(len(store), dtype=torch.float64))
    mine = range(len(pairs))[runtime.rank :: runtime.world_size]
    for start in range(0, len(mine), 64):
        block = mine[start : start + 64]
        pairs.reference[answers_of(block)], _ = answer_logprobs(model, pairs, block, 4)
    if runtime.world_size > 1:
        pairs.reference.copy_(runtime.all_reduce_sum(pairs.reference.to(runtime.device)))
    if runtime.local_rank == 0:
        buffer = io.BytesIO()
        np.save(buffer, pairs.reference.numpy(), allow_pickle=False)
        paths.atomic_write(path, buffer.getvalue())
    return pairs


def answer_logprobs(
    model: GPT,
    pairs: AnswerPairs,
    indices: Sequence[int],
    rows_per_batch: int,
    fill_up: bool = False,
) -> tuple[torch.Tensor, list[Rows]]:
    """Compute the answers' log-probabilities (2 len(indices),) float64; also returns their rows."""
    samples = pairs.samples(indices)
    T = model.config.context_length
    rows = pack_samples(samples, T, rows_per_batch, model.device, fill_up=fill_up)
    sums = torch.zeros(len(samples), dtype=torch.float64)
    for r, nll in zip(rows, score(model, rows), strict=True):
        r.sum_by_sample(-nll, sums)
    return sums, rows


@dataclass(frozen=True)
class PairScores:
    """Margins, losses and loss weights of some pairs."""

    margins: torch.Tensor
    """Differences m_chosen - m_rejected, (P,) float64; per token if `length_normalised`."""
    losses: torch.Tensor
    """Losses of the pairs, (P,) float64."""
    weights: torch.Tensor
    """Loss weights w of each answer's tokens, (2 P,) float64, chosen and rejected in turn."""


def pair_scores(
    ours: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    *,
    beta: float,
    length_normalised: bool = False,
) -> PairScores:
    """Compute margins, losses and weights of P pairs.

    ours, reference and lengths are (2 P,): log-probabilities and numbers of tokens, chosen and
    rejected answer in turn. With `length_normalised` an answer's margin is divided by its number of
    tokens, so that long and short answers count equally. beta must then be larger by about that
    number.
    """
    size = lengths.double() if length_normalised else torch.ones_like(ours)
    per_answer = (ours - reference) / size
    margins = per_answer[0::2] - per_answer[1::2]
    push = beta * torch.sigmoid(-beta * margins)
    weights = torch.stack([push, -push], dim=1).flatten() / size
    return PairScores(margins, torch.nn.functional.softplus(-beta * margins), weights)


def tally_pairs(scores: PairScores, ours: torch.Tensor) -> dict[str, float]:
    """Sum measurements over pairs; a tie counts as half a win."""
    wins = (torch.sign(scores.margins) + 1) / 2
    return {
        "pairs": float(len(scores.margins)),
        "pair_loss": scores.losses.sum().item(),
        "pair_wins": wins.sum().item(),
        "margin": scores.margins.sum().item(),
        "chosen_logprob": ours[0::2].sum().item(),
        "rejected_logprob": ours[1::2].sum().item(),
    }


def pair_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Compute means over pairs from the sums of `tally_pairs`."""
    return {name: value / sums["pairs"] for name, value in sums.items() if name != "pairs"}


class PreferencePairs:
    """Learning from the pairs of a file, and evaluation on the held-out pairs at its end."""

    updates = 1

    def __init__(self, cfg: RlConfig, start: Start, runtime: Runtime):
        self.cfg, preferences, self.count = cfg, cfg.preferences, cfg.rollouts.prompts_per_step
        path = Path(preferences.pairs).expanduser()
        store = runtime.in_turns(
            lambda: pairs_store(
                path,
                start.tokenizer,
                start.model.config.context_length + 1,
                system=start.system,
                bad_rows=preferences.bad_rows,
            )
        )
        size = len(store) // 2
        self.held_out = range(size - max(1, min(cfg.evaluating.eval_problems, size // 10)), size)
        if len(self.held_out) == size:
            raise UserError(f"--pairs {preferences.pairs} holds one pair; give at least two")
        order = MixtureOrder([self.held_out.start], [1.0], cfg.run.seed)
        self.stream = RowStream(order, [path.stem])
        self.num_steps = cfg.num_steps or max(1, cfg.epochs * self.held_out.start // self.count)
        self.what = f"{self.count} pairs"
        name = f"{start.meta['digest'][:16]}-{str(runtime.dtype).removeprefix('torch.')}"
        self.pairs = with_reference(store, start.model, name, runtime)

    def compare(
        self, stage: Stage, indices: Sequence[int]
    ) -> tuple[PairScores, torch.Tensor, list[Rows]]:
        """Score some pairs; returns DPO's scores, the log-probabilities, and the answers' rows."""
        compiles = self.cfg.run.compiles(stage.runtime.device)
        rows_per_batch = stage.plan.device_batch_size
        ours, rows = answer_logprobs(stage.model, self.pairs, indices, rows_per_batch, compiles)
        scores = pair_scores(
            ours,
            self.pairs.reference[answers_of(indices)],
            torch.tensor([sum(sample.mask) for sample in self.pairs.samples(indices)]),
            beta=self.cfg.preferences.beta,
            length_normalised=self.cfg.preferences.length_normalised,
        )
        return scores, ours, rows

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Compute loss, wins and margins on held-out pairs; each rank scores a share."""
        runtime = stage.runtime
        scores, ours, _ = self.compare(stage, self.held_out[runtime.rank :: runtime.world_size])
        return pair_metrics(sum_over_ranks(tally_pairs(scores, ours), runtime))

    def learn(self, stage: Stage) -> Iterator[tuple[StepStats, dict[str, float]]]:
        """Take the optimizer step on the next pairs; yields its stats and further measurements."""
        runtime, began = stage.runtime, time.perf_counter()
        indices = [next(self.stream)[2] for _ in range(self.count)]
        scores, ours, rows = self.compare(stage, indices[runtime.rank :: runtime.world_size])
        stats = train_step(
            stage.model,
            stage.optimizer,
            [r.weighted(scores.weights) for r in rows],
            stage.plan.hypers(stage.state.step),
            runtime,
            stage.loss_scale,
            divisor=len(indices),
            step=stage.state.step + 1,
        )
        sums = {**tally_pairs(scores, ours), "tokens": float(sum(r.tokens for r in rows))}
        sums = sum_over_ranks(sums, runtime)
        tokens = int(sums.pop("tokens"))
        self.stream.count(0, len(indices), tokens)
        seconds = time.perf_counter() - began
        metrics = pair_metrics(sums)
        yield replace(stats, loss=metrics["pair_loss"], tokens=tokens, seconds=seconds), metrics
