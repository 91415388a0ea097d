"""GPT's function arranged for decoding: the same weights, fewer and faster steps per token.

B batch, T time, C channels, H query heads, K key/value heads, D head dim, V vocabulary, N, M rows

Against `GPT.next_logits`, which is its slow twin in the tests:
- Weights are in the compute dtype, to which the model casts its float32 masters at every use.
- Query, key, value and gate are one product; queries and keys are rotated and normed together.
- On CPUs weights are laid out in advance the way oneDNN's kernels read them: 1.3-2 times faster for
  1-16 rows in bfloat16, up to 1.7 times in float32.
- int8 (optional, CPUs): weights in 8 bits with a scale per output, for answers one at a time, where
  reading the weights is what takes the time.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F

from nanochat.attention import attend_cached
from nanochat.errors import UserError
from nanochat.gpt import GPT, Block, norm
from nanochat.kv_cache import KVCache
from nanochat.rope import rope_table

Quantize = Literal["none", "int8"]
INT8_ROWS = 4
"""More rows than this are multiplied with dequantised weights: the int8 kernel takes them one by
one."""


class Product:
    """x (..., C) -> (..., N) with the weight (N, C) laid out for decoding."""

    def __init__(self, weight: torch.Tensor, quantize: Quantize = "none"):
        self.width = weight.shape[0]
        self.weight: torch.Tensor | None = weight
        self.packed: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        if quantize == "int8":
            scale = weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127
            self.weight = (weight.float() / scale[:, None]).round().to(torch.int8)
            self.scale = scale.to(weight.dtype)
        elif weight.device.type == "cpu":
            self.packed = _pack(weight)
            if self.packed is not None:
                self.weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.packed, None, "none", [], ""
            )
            return product
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
        torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed


class _Layer:
    """One block's weights."""

    def __init__(self, model: GPT, layer: int, quantize: Quantize):
        dtype, block = model.compute_dtype, cast(Block, model.blocks[layer])
        attention = block.attention
        weights = [attention.query.weight, attention.key.weight, attention.value.weight]
        if attention.value_gate is not None:
            weights.append(attention.value_gate.weight)
        self.inputs = Product(torch.cat([w.to(dtype) for w in weights]), quantize)
        self.out = Product(attention.out.weight.to(dtype), quantize)
        self.up = Product(block.mlp.up.weight.to(dtype), quantize)
        self.down = Product(block.mlp.down.weight.to(dtype), quantize)
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
    """Made of a model's present weights; after training it further, make a new one."""

    @torch.no_grad()
    def __init__(self, model: GPT, quantize: Quantize = "none"):
        if quantize != "none" and not (
            model.device.type == "cpu" and model.compute_dtype == torch.bfloat16
        ):
            raise UserError(
                f"quantize {quantize} works on CPUs in bfloat16, not on {model.device.type} in "
                f"{str(model.compute_dtype).removeprefix('torch.')}; "
                "use --device cpu --dtype bfloat16, or leave it out"
            )
        self.config = model.config
        self.compute_dtype = model.compute_dtype
        self.device = model.device
        self.embedding = model.embedding.weight.to(self.compute_dtype)
        self.layers = [_Layer(model, i, quantize) for i in range(model.config.n_layer)]
        head = model.head.weight[: model.config.vocab_size].to(self.compute_dtype)
        self.head = Product(head, quantize)
        self.windows = {layer.window for layer in self.layers}

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache in the compute dtype."""
        config = self.config
        return KVCache(
            config.n_layer,
            config.n_kv_head,
            config.head_dim,
            batch_size,
            capacity,
            dtype=self.compute_dtype,
            device=self.device,
        )

    def next_logits(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, V) float32: logits after each row's last valid token, appending ids to the cache.

        Row b's first counts[b] of ids (B, T) are valid, all of them by default.
        """
        hidden = self._hidden(ids, cache, counts)
        if counts is None:
            hidden = hidden[:, -1]
        else:
            hidden = hidden[cache.rows[:, 0], (counts - 1).clamp(min=0)]
        return self.logits(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) -> softcapped float32 logits (..., V)."""
        softcap = self.config.softcap
        return self.head(norm(hidden)).float().div_(softcap).tanh_().mul_(softcap)

    def _hidden(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T, C): the residual stream after the last layer."""
        config = self.config
        B, T = ids.shape
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        reading = cache.read(T, counts, self.windows, self.compute_dtype)
        rotary = {w: self._rotary(reading.positions, w > 0) for w in self.windows}
        x = first = norm(F.embedding(ids, self.embedding))
        for i, layer in enumerate(self.layers):
            if layer.scales is not None:
                x = torch.add(x * layer.scales[0], first, alpha=layer.scales[1])
            inputs = layer.inputs(norm(x))  # (B, T, (H + 2K) D [+ K])
            heads = inputs[..., : (H + 2 * K) * D].view(B, T, H + 2 * K, D)
            v = heads[:, :, H + K :]
            if layer.value_embedding is not None:
                gate = 2 * torch.sigmoid(inputs[..., (H + 2 * K) * D :, None])
                v = v + gate * F.embedding(ids, layer.value_embedding).view(B, T, K, D)
            qk = norm(_rotate(heads[:, :, : H + K], *rotary[layer.window]))
            keys, values = cache.append(i, reading.slots, qk[:, :, H:], v)
            y = attend_cached(qk[:, :, :H], keys, values, reading.biases[layer.window])
            x = x + layer.out(y.reshape(B, T, H * D))
            x = x + layer.down(F.relu(layer.up(norm(x))).square_())
        cache.advance(T, counts)
        return x

    def _rotary(self, positions: torch.Tensor, windowed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, 1, D) each: cosines twice, and sines with the sign of their half."""
        base = self.config.windowed_rope_base if windowed else self.config.rope_base
        cos, sin = rope_table(positions, self.config.head_dim, base)
        cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        return torch.cat((cos, cos), -1)[:, :, None], torch.cat((sin, -sin), -1)[:, :, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` in three operations: each half plus the other one, turned by a quarter."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
