"""The model: a decoder-only transformer.

B batch, T time, C channels, H query heads, K key/value heads, D head dim, V vocabulary

Rotary positions, QK-norm, weightless RMSNorm, ReLU^2 MLP (arXiv 2109.08668), no biases, untied
embedding and head, grouped-query attention, logit softcap (Gemma 2, arXiv 2408.00118). Optional:
value embeddings on alternating layers behind a gate per head (ResFormer, arXiv 2410.17897),
per-layer scalars on the residual stream and on the first embedding, a token shift (an embedding
gets a share of the one before it, per channel; RWKV, arXiv 2305.13048), spelled embeddings (a
token's embedding is in part the sum of learned vectors of its bytes; arXiv 2601.18030), sliding
windows. The portable variant has none of the options and loads as transformers' own `nanochat`
model type.

Precision: weights are float32; the activations run in `compute_dtype`, to which `Linear` casts its
weight. Norms, softmax and the loss reduce in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.attention import Layout, attend, attend_cached, choose_backend, make_layout
from nanochat.errors import UserError
from nanochat.functional import norm, relu_squared
from nanochat.kv_cache import KVCache
from nanochat.loss import MAX_EXPONENT, softcapped_losses, summed_softcapped_loss
from nanochat.rope import apply_rope, extended_base, rope_table


@dataclass(frozen=True)
class GPTConfig:
    """Settings that define the model's function; every checkpoint saves them."""

    vocab_size: int
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280
    head_dim: int = 128
    context_length: int = 2048
    windows: tuple[int, ...] = ()
    """Tokens that a query of each layer sees, its own included; 0: all. Empty: 0 for all layers."""
    rope_base: float = 10000.0
    """Rotary base of layers without a window."""
    windowed_rope_base: float = 10000.0
    """Rotary base of layers with a window; extending the context does not change it."""
    trained_context_length: int | None = None
    """Context length before the first extension; None: never extended."""
    trained_rope_base: float | None = None
    """`rope_base` before the first extension of the context; None: never extended."""
    value_embeddings: bool = True
    residual_scalars: bool = True
    token_shift: bool = True
    spelling_bytes: int = 16
    """Largest number of bytes of a token, without a space before it, whose vectors are added to its
    embedding; later bytes are ignored. 0: no spelling."""
    softcap: float = 15.0

    def __post_init__(self) -> None:
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise UserError(
                f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}; "
                "choose a divisor with --kv-heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even for rotary embedding")
        if self.windows and len(self.windows) != self.n_layer:
            raise UserError(f"{len(self.windows)} windows for {self.n_layer} layers")

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary size rounded up to a multiple of 64; the extra rows are never predicted."""
        return -(-self.vocab_size // 64) * 64

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def has_value_embedding(self, layer: int) -> bool:
        """Return True for every second layer, counted back from the last one."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2

    def check_length(self, tokens: int) -> None:
        """Raise UserError for more tokens than the context has."""
        if tokens > self.context_length:
            raise UserError(
                f"{tokens} tokens are more than the context length {self.context_length}; "
                "shorten the input, or extend the model with mid_train --context-length"
            )

    @property
    def is_portable(self) -> bool:
        """True if transformers' `nanochat` model type computes the function of `GPT.plain`."""
        options = self.value_embeddings or self.residual_scalars or self.token_shift
        plain = not (options or any(self.windows))
        return plain and self.head_dim * self.n_head == self.n_embd


def config_from_depth(
    depth: int,
    vocab_size: int,
    *,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    kv_heads: int | None = None,
    context_length: int = 2048,
    window_pattern: str = "SSSL",
    portable: bool = False,
) -> GPTConfig:
    """Build the configuration of a model of `depth` layers; the other settings follow from it.

    The width is `aspect_ratio` channels per layer, rounded up to a multiple of `head_dim`. Raises
    UserError for sizes below 1 and for a window pattern with other letters than S and L.
    """
    for flag, value in (
        ("depth", depth),
        ("aspect-ratio", aspect_ratio),
        ("head-dim", head_dim),
        ("context-length", context_length),
    ):
        if value < 1:
            raise UserError(f"--{flag} {value} must be at least 1")
    if not window_pattern or set(window_pattern) - set("SL"):
        raise UserError(f"--window-pattern {window_pattern!r} may hold only S and L")
    width = -(-depth * aspect_ratio // head_dim) * head_dim
    pattern = "L" if portable else window_pattern
    sizes = {"L": 0, "S": context_length // 2}
    windows = [sizes[pattern[layer % len(pattern)]] for layer in range(depth)]
    windows[-1] = 0
    return GPTConfig(
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=width // head_dim,
        n_kv_head=width // head_dim if kv_heads is None else kv_heads,
        n_embd=width,
        head_dim=head_dim,
        context_length=context_length,
        windows=tuple(windows) if any(windows) else (),
        value_embeddings=not portable,
        residual_scalars=not portable,
        token_shift=not portable,
        spelling_bytes=0 if portable else GPTConfig.spelling_bytes,
    )


def extend_context(
    config: GPTConfig, new_length: int, rope_scaling: Literal["abf", "none"] = "abf"
) -> GPTConfig:
    """Return the configuration of the same model with a longer context.

    Only the rotary base of layers without a window changes. `rope.extended_base` computes it from
    the first base and the first context length, so extending twice gives exactly what extending
    once to the final length gives. Layers with a window keep their base and window, because they
    look no farther than before. rope_scaling="none" keeps the base, for comparison. The present
    length returns the configuration unchanged; a shorter one, or head_dim 2 with "abf", raises
    UserError.

    >>> twice = extend_context(extend_context(GPTConfig(64), 4096), 8192)
    >>> twice == extend_context(GPTConfig(64), 8192)
    True
    """
    if new_length < config.context_length:
        raise UserError(
            f"--context-length {new_length} is shorter than the model's {config.context_length}; "
            "a context can only be extended (shorter inputs need no change)"
        )
    if new_length == config.context_length:
        return config
    first_length = config.trained_context_length or config.context_length
    first_base = config.trained_rope_base or config.rope_base
    base = config.rope_base
    if rope_scaling == "abf":
        if config.head_dim == 2:
            raise UserError(
                "a context cannot be extended by abf with head_dim 2: no pair is slower than "
                "the first; use --rope-scaling none"
            )
        base = extended_base(first_base, config.head_dim, first_length, new_length)
    return replace(
        config,
        context_length=new_length,
        rope_base=base,
        trained_context_length=first_length,
        trained_rope_base=first_base,
    )


class Linear(nn.Linear):
    """A bias-free linear map that casts its float32 weight to the activation's dtype."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: `GPT.init_weights` draws the weights, or a checkpoint brings them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Make an embedding with undefined weights; drawing them on meta would import the compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim = layer, D
        self.window = config.window(layer)
        self.query = Linear(C, H * D)
        self.key = Linear(C, K * D)
        self.value = Linear(C, K * D)
        self.out = Linear(H * D, C)
        self.value_gate = Linear(C, K) if config.has_value_embedding(layer) else None

    def forward(
        self,
        x: torch.Tensor,
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.query(x).view(B, T, -1, self.head_dim)
        k = self.key(x).view(B, T, -1, self.head_dim)
        v = self.value(x).view(B, T, -1, self.head_dim)
        if self.value_gate is not None and value_embedding is not None:
            # A gate in (0, 2) per head that starts at 1.
            gate = 2 * torch.sigmoid(self.value_gate(x))[..., None]
            v = v + gate * value_embedding.view_as(v)
        q, k = norm(apply_rope(q, *rotary)), norm(apply_rope(k, *rotary))
        y = attention(q, k, v, self.layer, self.window)
        return self.out(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(relu_squared(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        x = x + self.attention(norm(x), value_embedding, rotary, attention)
        x = x + self.mlp(norm(x))
        return x


class GPT(nn.Module):
    """The whole model. Its constructor leaves parameters undefined; `init_weights` draws them."""

    spelling: torch.Tensor
    """Rows (V, P) of the byte embedding that spell each token: a buffer, saved in checkpoints."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute = False
        self.backend: str | None = None
        """Attention backend; None: the fastest one for device and dtype."""
        V, C = config.padded_vocab_size, config.n_embd
        self.embedding = _embedding(V, C)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): _embedding(V, config.n_kv_head * config.head_dim)
                for i in range(config.n_layer)
                if config.has_value_embedding(i)
            }
        )
        self.head = Linear(C, V)
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.ones(config.n_layer))
            self.first_scale = nn.Parameter(torch.zeros(config.n_layer))
        if config.token_shift:
            self.shift_scale = nn.Parameter(torch.zeros(C))
        if config.spelling_bytes:
            # Row 256 p + b is the vector of byte b at position p. Row 0, which would be that of a
            # NUL byte at the start, means "no byte".
            self.byte_embedding = _embedding(256 * config.spelling_bytes, C)
            spelling = torch.zeros(V, config.spelling_bytes, dtype=torch.int32)
            self.register_buffer("spelling", spelling)
        self.token_losses: Callable[..., torch.Tensor] = self._token_losses
        self.summed_loss: Callable[..., torch.Tensor] = self._summed_loss

    def init_weights(self, seed: int, tokens: Sequence[bytes]) -> "GPT":
        """Draw every parameter from one seeded stream, the same on any device; returns self.

        `tokens` are the bytes that the first ids stand for (`Tokenizer.ranks`); later ids (special
        tokens, padding) have no spelling.

        Matrices and value embeddings are uniform in +-sqrt(3)/sqrt(C) (standard deviation
        1/sqrt(C)). Output projections, gates and the token shift are zero. The head is normal with
        standard deviation 0.001, the embedding normal with 0.8, that of the bytes normal with 0.3.
        """
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / self.config.n_embd)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                value = torch.empty(parameter.shape)
                if name == "embedding.weight":
                    value.normal_(0, 0.8, generator=generator)
                elif name == "byte_embedding.weight":
                    value.normal_(0, 0.3, generator=generator)
                elif name == "head.weight":
                    value.normal_(0, 0.001, generator=generator)
                elif name == "residual_scale":
                    value.fill_(1.0)
                elif name in ("first_scale", "shift_scale") or name.endswith(
                    ("attention.out.weight", "mlp.down.weight", "value_gate.weight")
                ):
                    value.zero_()
                else:
                    value.uniform_(-bound, bound, generator=generator)
                parameter.copy_(value)
        longest = self.config.spelling_bytes
        if longest:
            rows = [
                [256 * p + byte for p, byte in enumerate(token.removeprefix(b" ")[:longest])]
                for token in tokens
            ]
            rows += [[]] * (self.config.padded_vocab_size - len(rows))
            padded = [row + [0] * (longest - len(row)) for row in rows]
            self.spelling.copy_(torch.tensor(padded, dtype=torch.int32))
        return self

    @torch.no_grad()
    def plain_weights(self) -> dict[str, torch.Tensor]:
        """Tensors by name, with the spelling of each token added to its row of the embedding.

        They are those of a model without spelled embeddings that computes the same function.
        """
        weights = self.state_dict()
        if self.config.spelling_bytes:
            del weights["byte_embedding.weight"], weights["spelling"]
            weights["embedding.weight"] = self.embedding.weight + self._spelled(self.spelling)
        return weights

    def plain(self) -> "GPT":
        """Return the model of `plain_weights`; all but its embedding are this model's tensors."""
        if not self.config.spelling_bytes:
            return self
        with torch.device("meta"):
            same = GPT(replace(self.config, spelling_bytes=0), self.compute_dtype)
        same.load_state_dict(self.plain_weights(), assign=True)
        return same

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def num_parameters(self) -> dict[str, int]:
        """Count the parameters of each group; padding rows of the vocabulary are included."""
        blocks = sum(p.numel() for p in self.blocks.parameters())
        gates = sum(p.numel() for n, p in self.blocks.named_parameters() if "value_gate" in n)
        return {
            "embedding": self.embedding.weight.numel()
            + (self.byte_embedding.weight.numel() if self.config.spelling_bytes else 0),
            "value_embeddings": sum(p.numel() for p in self.value_embeddings.parameters()),
            "block_matrices": blocks - gates,
            "head": self.head.weight.numel(),
            "gates_and_scalars": gates
            + (2 * self.config.n_layer if self.config.residual_scalars else 0)
            + (self.config.n_embd if self.config.token_shift else 0),
        }

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Training FLOPs (forward and backward) per token of a full row, matmuls only.

        A matrix costs 6 per parameter. Attention costs 12 * H * D per visible key; the number of
        keys is the mean over the causal (windowed) queries of a row that holds one document
        (PaLM, arXiv 2204.02311, app. B).
        """
        T = context_length or self.config.context_length
        counts = self.num_parameters()
        total = 6 * (counts["block_matrices"] + counts["head"])
        for layer in range(self.config.n_layer):
            window = min(self.config.window(layer) or T, T)
            keys = (window * (window + 1) / 2 + (T - window) * window) / T
            total += int(12 * self.config.n_head * self.config.head_dim * keys)
        return total

    def make_layout(
        self,
        doc_ids: torch.Tensor | None,
        shape: Sequence[int],
        boundaries: torch.Tensor | None = None,
    ) -> Layout:
        backend = self.backend or choose_backend(
            self.device, self.compute_dtype, self.config.head_dim
        )
        windows = tuple(self.config.window(i) for i in range(self.config.n_layer))
        return make_layout(doc_ids, (shape[0], shape[1]), windows, backend, self.device, boundaries)

    def _rotary(self, positions: torch.Tensor) -> dict[bool, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines (..., 1, D/2) in the compute dtype, keyed by "has a window"."""
        bases = {False: self.config.rope_base, True: self.config.windowed_rope_base}
        tables = {}
        for windowed, base in bases.items():
            cos, sin = rope_table(positions, self.config.head_dim, base)
            tables[windowed] = (
                cos[..., None, :].to(self.compute_dtype),
                sin[..., None, :].to(self.compute_dtype),
            )
        return tables

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up normalised embeddings (..., C) of ids (...), in the compute dtype."""
        x = self.embedding(ids)
        if self.config.spelling_bytes:
            x = x + self._spelled(self.spelling[ids])
        return norm(x.to(self.compute_dtype))

    def _spelled(self, spelling: torch.Tensor) -> torch.Tensor:
        """Sum the vectors of bytes given as rows (..., P) of `spelling`: (..., C) in float32."""
        weight = self.byte_embedding.weight
        bags = spelling.reshape(-1, spelling.shape[-1])
        sums = F.embedding_bag(bags, weight, mode="sum", padding_idx=0)
        return sums.view(*spelling.shape[:-1], weight.shape[1])

    def _trunk(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Callable[..., torch.Tensor],
        before: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Compute normalised hidden states (B, T, C) of ids (B, T), in the compute dtype.

        `before` gives the embeddings of the tokens before these, from those of these (B, T, C).
        """
        rotary = self._rotary(positions)
        x = self._embedded(ids)
        if self.config.token_shift:
            x = x + self.shift_scale.to(x.dtype) * before(x)
        first = x
        for i, block in enumerate(self.blocks):
            if self.config.residual_scalars:
                scale, first_scale = self.residual_scale[i], self.first_scale[i]
                x = scale.to(x.dtype) * x + first_scale.to(x.dtype) * first
            value = None
            if str(i) in self.value_embeddings:
                value = self.value_embeddings[str(i)](ids).to(self.compute_dtype)
            arguments = (x, value, rotary[self.config.window(i) > 0], attention)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return norm(x)

    def hidden(self, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Compute the hidden states (B, T, C) of ids (B, T), which the head reads."""

        def attention(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, window: int
        ) -> torch.Tensor:
            return attend(q, k, v, layout, window)

        def before(x: torch.Tensor) -> torch.Tensor:
            return F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(layout.begins[..., None], 0)

        positions = torch.arange(ids.shape[1], device=ids.device)
        return self._trunk(ids, positions, attention, before)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute softcapped float32 logits (..., V) of hidden (..., C), padding rows left out."""
        raw = self.head(hidden)[..., : self.config.vocab_size].float()
        return self.config.softcap * torch.tanh(raw / self.config.softcap)

    def forward(
        self,
        ids: torch.Tensor,
        doc_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits (B, T, V) float32 after each of ids (B, T).

        With a cache, row b's first counts[b] ids (all of them by default) continue what the cache
        holds. The rest of the row is padding, and its logits are meaningless. Rows longer than the
        context raise UserError.
        """
        self._check_length(ids.shape[1], cache)
        if cache is None:
            return self.logits(self.hidden(ids, self.make_layout(doc_ids, ids.shape)))
        return self.logits(self._cached_hidden(ids, cache, counts))

    def next_logits(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Append ids to the cache; return float32 logits (B, V) after each row's last valid id."""
        self._check_length(ids.shape[1], cache)
        hidden = self._cached_hidden(ids, cache, counts)
        if counts is None:
            return self.logits(hidden[:, -1])
        last = (counts - 1).clamp(min=0)
        return self.logits(hidden[torch.arange(len(ids), device=ids.device), last])

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Create an empty cache in the compute dtype on the model's device."""
        config = self.config
        config.check_length(capacity)
        shape = (config.n_layer, config.n_kv_head, config.head_dim, batch_size, capacity)
        return KVCache(*shape, dtype=self.compute_dtype, device=self.device)

    def _check_length(self, T: int, cache: KVCache | None) -> None:
        self.config.check_length(T)
        if cache is not None and cache.capacity < T:
            raise ValueError(f"{T} tokens do not fit into a cache of {cache.capacity}")

    def _cached_hidden(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None
    ) -> torch.Tensor:
        T = ids.shape[1]
        windows = {self.config.window(i) for i in range(self.config.n_layer)}
        reading = cache.read(T, counts, windows, self.compute_dtype)

        def attention(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, window: int
        ) -> torch.Tensor:
            keys, values = cache.append(layer, reading.slots, k, v)
            return attend_cached(q, keys, values, reading.biases[window])

        def before(x: torch.Tensor) -> torch.Tensor:
            known = (cache.last_ids >= 0)[:, None]
            last = self._embedded(cache.last_ids.clamp(min=0)) * known.to(x.dtype)
            return torch.cat((last[:, None], x[:, :-1]), dim=1)

        hidden = self._trunk(ids, reading.positions, attention, before)
        cache.advance(ids, counts)
        return hidden

    def nll(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        doc_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        boundaries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood (B, T) float32 in nats; 0 where the target is -1.

        The distribution is softmax(logits / temperature): reinforcement learning scores its samples
        at the temperature they were drawn at. The head runs in chunks, and again in the backward
        pass, so that (B*T, V) logits never exist at once. Rows longer than the context raise
        UserError, and so does a temperature so low that float32 exponentials overflow. `boundaries`
        are those of a Batch; without them the host waits for a GPU to find them in doc_ids.
        """
        layout = self._loss_layout(inputs, doc_ids, temperature, boundaries)
        return self.token_losses(inputs, targets, layout, temperature)

    def weighted_loss(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        doc_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        boundaries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the losses, a scalar: the objective of training.

        inputs, targets, weights and doc_ids are (B, T). The value is `(weights * nll(...)).sum()`.
        As the weights are known beforehand, the gradient of the logits is computed in the forward
        pass, and the head does not run again in the backward pass. Errors are those of `nll`.
        """
        layout = self._loss_layout(inputs, doc_ids, temperature, boundaries)
        return self.summed_loss(inputs, targets, weights, layout, temperature)

    def _loss_layout(
        self,
        inputs: torch.Tensor,
        doc_ids: torch.Tensor | None,
        temperature: float,
        boundaries: torch.Tensor | None,
    ) -> Layout:
        self._check_length(inputs.shape[1], None)
        if not 2 * self.config.softcap / MAX_EXPONENT <= temperature < math.inf:
            raise UserError(
                f"temperature {temperature} of the loss must be at least "
                f"{2 * self.config.softcap / MAX_EXPONENT:g} and finite"
            )
        return self.make_layout(doc_ids, inputs.shape, boundaries)

    def _summed_loss(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        layout: Layout,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        return summed_softcapped_loss(
            self.hidden(inputs, layout).flatten(0, 1),
            self.head.weight,
            targets.flatten(),
            weights.flatten(),
            self.config.softcap,
            self.config.vocab_size,
            temperature,
            fused=torch.compiler.is_compiling(),
        )[0]

    def _token_losses(
        self, inputs: torch.Tensor, targets: torch.Tensor, layout: Layout, temperature: float = 1.0
    ) -> torch.Tensor:
        hidden = self.hidden(inputs, layout).flatten(0, 1)  # (B*T, C)
        losses = softcapped_losses(
            hidden,
            self.head.weight,
            targets.flatten(),
            self.config.softcap,
            self.config.vocab_size,
            temperature,
            fused=torch.compiler.is_compiling(),
        )
        return losses.view_as(targets)

    def compile_loss(self) -> None:
        """Compile the loss graph. The layout stays outside, so new documents never recompile it.

        Each shape has a graph of its own: training and evaluation, every length of a
        `--context-schedule`, every doubling of the number of documents in a batch.
        """
        # torch's default limit would make the ninth graph of a run an error.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
        self.token_losses = torch.compile(self._token_losses, fullgraph=True, dynamic=False)
        self.summed_loss = torch.compile(self._summed_loss, fullgraph=True, dynamic=False)
