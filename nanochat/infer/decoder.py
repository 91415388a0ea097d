"""GPT's function arranged for decoding: the same weights, fewer and faster steps per token.

B batch, T time, N = B * T tokens, C channels, H query heads, K key/value heads, G = H / K, D head
dim, S cache slots, V vocabulary

Against `GPT.next_logits`, which is its slow twin in the tests:
- Weights are in the compute dtype, to which the model casts its float32 masters at every use.
- Query, key, value and gate are one product; queries and keys are rotated and normed together.
- Cosines and sines are looked up; a single token per row attends in three operations, and goes into
  the cache by plain assignment where all rows are equally long.
- On CPUs RMSNorm is one kernel instead of eight operations.
- On CPUs weights are laid out in advance the way oneDNN's kernels read them: 1.3-2 times faster for
  1-16 rows in bfloat16, up to 1.7 times in float32.
- int8 (optional, CPUs): weights in 8 bits with a scale per output, for answers one at a time, where
  reading the weights is what takes the time.
- A step can be compiled (optional, for GPUs): for every shape of the cache one graph that works on
  the same memory each time, as CUDA graphs need it.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from nanochat.attention import attend_cached
from nanochat.errors import UserError
from nanochat.functional import norm
from nanochat.gpt import GPT, Block
from nanochat.kv_cache import KVCache, Reading, plan_reading, write
from nanochat.rope import rope_table

Quantize = Literal["none", "int8"]
INT8_ROWS = 4
"""More rows than this are multiplied with dequantised weights: the int8 kernel takes them one by
one."""


FLOAT_ELEMENTS = 2**18
"""Up to so many key elements are converted to float32, whose small batched products are faster."""


LEAST_RMS = 0.1
"""Where weights may make vectors smaller than this, RMSNorm is computed with its epsilon."""


class Product:
    """x (..., C) -> (..., M) with the weight (M, C) laid out for decoding."""

    def __init__(self, weight: torch.Tensor, quantize: Quantize = "none", pack: bool = True):
        self.width = weight.shape[0]
        self.weight: torch.Tensor | None = weight
        self.packed: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        if quantize == "int8":
            scale = weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127
            self.weight = (weight.float() / scale[:, None]).round().to(torch.int8)
            self.scale = scale.to(weight.dtype)
        elif weight.device.type == "cpu" and pack:
            self.packed = _pack(weight)
            if self.packed is not None:
                self.weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, self.packed, None, "none", [], ""
            )
            return y
        assert self.weight is not None
        if self.scale is None:
            return F.linear(x, self.weight)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= INT8_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        return y.view(*x.shape[:-1], self.width)


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's layout, None where this build or processor has none for its dtype."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        probe = weight.new_zeros(1, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise.default(probe, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed


class _Layer:
    """One block's weights."""

    def __init__(self, model: GPT, layer: int, quantize: Quantize, pack: bool):
        dtype, block = model.compute_dtype, cast(Block, model.blocks[layer])
        attention = block.attention
        weights = [attention.query.weight, attention.key.weight, attention.value.weight]
        if attention.value_gate is not None:
            weights.append(attention.value_gate.weight)
        self.inputs = Product(torch.cat([w.to(dtype) for w in weights]), quantize, pack)
        self.out = Product(attention.out.weight.to(dtype), quantize, pack)
        self.up = Product(block.mlp.up.weight.to(dtype), quantize, pack)
        self.down = Product(block.mlp.down.weight.to(dtype), quantize, pack)
        self.window = model.config.window(layer)
        self.value_embedding: torch.Tensor | None = None
        if str(layer) in model.value_embeddings:
            embedding = cast(torch.nn.Embedding, model.value_embeddings[str(layer)])
            self.value_embedding = embedding.weight.to(dtype)
        self.scales: tuple[float, float] | None = None
        if model.config.residual_scalars:
            self.scales = (
                float(model.residual_scale[layer].to(dtype)),
                float(model.first_scale[layer].to(dtype)),
            )


class Decoder:
    """Made of a model's present weights; after training it further, make a new one.

    compiled: steps of one token per row run as compiled graphs (`compile_step`), and the engine
    keeps the shape of its cache as constant as it can.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, quantize: Quantize = "none", compiled: bool = False):
        if quantize != "none" and not (
            model.device.type == "cpu" and model.compute_dtype == torch.bfloat16
        ):
            raise UserError(
                f"quantize {quantize} works on CPUs in bfloat16, not on {model.device.type} in "
                f"{str(model.compute_dtype).removeprefix('torch.')}; "
                "use --device cpu --dtype bfloat16, or leave it out"
            )
        if compiled and model.device.type != "cuda":
            raise UserError(f"--cuda-graphs works on CUDA devices, not on {model.device.type}")
        self.config = config = model.config
        self.compute_dtype = model.compute_dtype
        self.device = model.device
        self.embedding = model.embedding.weight.to(self.compute_dtype)
        # The compiler packs weights itself if that pays.
        self.layers = [_Layer(model, i, quantize, not compiled) for i in range(config.n_layer)]
        head = model.head.weight[: config.vocab_size].to(self.compute_dtype)
        self.head = Product(head, quantize, not compiled)
        self.floor = torch.tensor(-config.softcap, device=self.device)
        self.norm = _fast_norm if self.device.type == "cpu" and _norms_are_large(model) else norm
        self.windows = {layer.window for layer in self.layers}
        self.rotary = {window: self._rotary_table(window > 0) for window in self.windows}
        self.compiled_step: Any = None
        if compiled:
            self.compile_step()

    def compile_step(self, **options: Any) -> None:
        """Compile steps of one token per row; options are torch.compile's.

        By default for CUDA graphs: mode reduce-overhead. Each shape of a pinned cache has its own
        graph; other caches are read without.
        """
        options = options or {"mode": "reduce-overhead"}
        self.compiled_step = torch.compile(self._step, fullgraph=True, dynamic=False, **options)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache in the compute dtype."""
        config = self.config
        if capacity > config.context_length:
            raise UserError(
                f"{capacity} tokens are more than the context length {config.context_length}; "
                "shorten the input, or extend the model with mid_train --context-length"
            )
        return KVCache(
            config.n_layer,
            config.n_kv_head,
            config.head_dim,
            batch_size,
            capacity,
            dtype=self.compute_dtype,
            device=self.device,
        )

    @torch.no_grad()  # oneDNN's kernels for training are not made for one row: 50 times slower
    def next_logits(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, V) float32: logits after each row's last valid token, appending ids to the cache.

        Row b's first counts[b] of ids (B, T) are valid, all of them by default.
        """
        if self.compiled_step is not None and cache.pinned and ids.shape[1] == 1:
            if counts is None:
                counts = torch.ones_like(cache.lengths)
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits were read
            logits: torch.Tensor = self.compiled_step(
                ids, counts, cache.lengths, cache.keys, cache.values, cache.capacity
            )
            cache.widen_bounds(1, counts)
            return logits
        hidden = self.hidden(ids, cache, counts)
        if counts is None:
            hidden = hidden[:, -1]
        else:
            rows = torch.arange(len(ids), device=ids.device)
            hidden = hidden[rows, (counts - 1).clamp(min=0)]
        return self.logits(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) -> softcapped float32 logits (..., V)."""
        softcap = self.config.softcap
        # softcap * tanh(x / softcap): sigmoid takes a quarter of the time of tanh on CPUs.
        s = self.head(self.norm(hidden)).float().mul_(2 / softcap).sigmoid_()
        return torch.add(self.floor, s, alpha=2 * softcap)

    def _step(
        self,
        ids: torch.Tensor,
        counts: torch.Tensor,
        lengths: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        capacity: int,
    ) -> torch.Tensor:
        """`next_logits` of one token per row as a function of tensors, which it updates."""
        _, K, S, _ = keys[0].shape
        reading = plan_reading(lengths, 1, (K, S), capacity, self.windows, self.compute_dtype)
        logits = self.logits(self._layers(ids, reading, keys, values)[:, -1])
        lengths.add_(counts)
        return logits

    def hidden(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, C): the residual stream after the last layer, for `logits`; appends ids as
        `next_logits` does."""
        T = ids.shape[1]
        reading = cache.read(T, counts, self.windows, self.compute_dtype)
        x = self._layers(ids, reading, cache.keys, cache.values)
        cache.advance(T, counts)
        return x

    def _layers(
        self,
        ids: torch.Tensor,
        reading: Reading,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """(B, T, C): the residual stream after the last layer; the cache's tensors are updated."""
        B, T = ids.shape
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        tokens, positions = ids.flatten(), reading.positions.flatten()
        rotary = {w: _turns(F.embedding(positions, table)) for w, table in self.rotary.items()}
        single = T == 1 and ids.device.type == "cpu"
        biases = reading.biases
        if single:  # a bias for each row and key/value head, in the dtype to attend in
            dtype = torch.float32 if keys[0].numel() <= FLOAT_ELEMENTS else keys[0].dtype
            biases = {
                w: b.to(dtype).expand(B, K, 1, -1).reshape(B * K, 1, -1) for w, b in biases.items()
            }
        x = first = self.norm(F.embedding(tokens, self.embedding))  # (N, C)
        for i, layer in enumerate(self.layers):
            if layer.scales is not None:
                x = torch.add(x * layer.scales[0], first, alpha=layer.scales[1])
            inputs = layer.inputs(self.norm(x))  # (N, (H + 2K) D [+ K])
            heads = inputs[:, : (H + 2 * K) * D].view(B * T, H + 2 * K, D)
            v = heads[:, H + K :]
            if layer.value_embedding is not None:
                gate = torch.sigmoid(inputs[:, (H + 2 * K) * D :, None])
                extra = F.embedding(tokens, layer.value_embedding).view(-1, K, D)
                v = torch.addcmul(v, gate, extra, value=2)
            qk = self.norm(_rotate(heads[:, : H + K], *rotary[layer.window]))
            if reading.column is None:
                write(keys[i], reading.slots, qk[:, H:])
                write(values[i], reading.slots, v)
            else:
                keys[i][:, :, reading.column] = qk[:, H:]
                values[i][:, :, reading.column] = v
            if single:
                y = _attend_single(qk[:, :H], keys[i], values[i], biases[layer.window])
            else:
                q = qk[:, :H].view(B, T, H, D)
                y = attend_cached(q, keys[i], values[i], biases[layer.window])
            x = layer.out(y.reshape(B * T, H * D)).add_(x)
            x = layer.down(layer.up(self.norm(x)).relu_().square_()).add_(x)
        return x.view(B, T, -1)

    def _rotary_table(self, windowed: bool) -> torch.Tensor:
        """(context + 1, 2D): cosines twice, then sines with the sign of their half."""
        config = self.config
        # One more for padding that does not fit.
        positions = torch.arange(config.context_length + 1, device=self.device)
        base = config.windowed_rope_base if windowed else config.rope_base
        cos, sin = rope_table(positions, config.head_dim, base)
        return torch.cat((cos, cos, sin, -sin), dim=-1).to(self.compute_dtype)


def _norms_are_large(model: GPT) -> bool:
    """Whether the vectors that are normed have a root mean square far above the epsilon's, 0.001.

    By the weights: embedding rows, and each head's queries and keys of a normed input. Scalars must
    not take the residual stream away.
    """
    D, C = model.config.head_dim, model.config.n_embd
    smallest = [model.embedding.weight[: model.config.vocab_size].square().mean(dim=1).min()]
    for i, block in enumerate(model.blocks):
        attention = cast(Block, block).attention
        for linear in (attention.query, attention.key):
            # Rows of independent inputs of variance 1: their products have the variance |row|^2.
            heads = linear.weight.view(-1, D * C)
            smallest.append(heads.square().sum(dim=1).min() / D)
        if model.config.residual_scalars:
            smallest.append(model.residual_scale[i].square() + model.first_scale[i].square())
    return bool(torch.stack(smallest).min() > LEAST_RMS**2)


def _fast_norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in one kernel of CPUs, the one that normalises weights; without its epsilon.

    The epsilon changes a vector of root mean square r by 5e-7 / r^2 of its length: less than the
    rounding to float32 for the vectors of a trained model (r = 0.7 to 48 at depth 4). Zeros would
    become NaN, hence `_norms_are_large`.
    """
    C = x.shape[-1]
    root = C**0.5
    rows = x.reshape(-1, C)
    if root % 1:  # the kernel takes the length in the dtype of x, where it would be rounded
        rows = rows.float()
    lengths = rows.new_full((len(rows), 1), root)
    y = torch._weight_norm_interface(rows, lengths, 0)[0]
    return y.to(x.dtype).view(x.shape)


def _turns(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 2D) of the table -> cosines and sines (N, 1, D)."""
    cos, sin = rows[:, None].chunk(2, dim=-1)
    return cos, sin


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` in three operations: each half plus the other one, turned by a quarter."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _attend_single(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`attend_cached` for one token per row. q (B, H, D), bias (B * K, 1, S) -> (B * K, G, D).

    The products are in the dtype of bias.
    """
    D = q.shape[-1]
    S = keys.shape[2]
    dtype, result_dtype = bias.dtype, q.dtype
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    q = q.reshape(bias.shape[0], -1, D)
    scores = torch.baddbmm(bias, q, keys.view(-1, S, D).transpose(1, 2), alpha=D**-0.5)
    return torch.bmm(scores.softmax(dim=-1), values.view(-1, S, D)).to(result_dtype)
