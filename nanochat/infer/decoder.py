"""Decoder: computes the same function as GPT, with fewer and faster operations per token.

B batch, T time, N = B * T tokens, C channels, H query heads, K key/value heads, G = H / K, D head
dim, S cache slots, V vocabulary

The tests compare it with `GPT.next_logits`. The differences are:
- Weights are kept in the compute dtype. The model casts its float32 weights at every use.
- Query, key, value and gate are one product. Queries and keys are rotated and normed together.
- Cosines and sines are looked up in a table, and so is what a token shift adds.
- Attention of a single token per row is three operations. If all rows are equally long, its key and
  value are written to the cache by plain assignment.
- On CPUs, RMSNorm is one kernel instead of eight operations.
- On CPUs, weights are stored in the layout that oneDNN's kernels read. This is 1.3-2 times faster
  for 1-16 rows in bfloat16, and up to 1.7 times in float32.
- With int8 (optional, on CPUs), weights have 8 bits and a scale per output. This helps for one
  answer at a time, when reading the weights takes most of the time.
- Compiled steps (optional, on GPUs) have one graph per shape of the cache. It uses the same memory
  each time, as CUDA graphs require.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from nanochat.attention import attend_cached
from nanochat.errors import UserError
from nanochat.functional import norm
from nanochat.gpt import GPT, Block
from nanochat.kv_cache import KVCache, Reading, keep_last, plan_reading, write
from nanochat.rope import rope_table

Quantize = Literal["none", "int8"]
INT8_ROWS = 4
"""Largest number of rows for the int8 kernel, which multiplies rows one by one. More rows are
multiplied with dequantised weights."""


FLOAT_ELEMENTS = 2**18
"""Largest number of key elements that are converted to float32, in which small batched products are
faster."""


LEAST_RMS = 0.1
"""Smallest root mean square for which RMSNorm may be computed without its epsilon."""


class Product:
    """Product of x (..., C) with a weight (M, C), stored for fast decoding; gives (..., M)."""

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
            return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")
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
    """Convert a weight to oneDNN's layout; None if this build or CPU has none for its dtype."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        probe = weight.new_zeros(1, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise.default(probe, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed


class _Layer:
    """Weights of one block."""

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
    """A model's present weights, arranged for decoding; further training needs a new Decoder.

    compiled: steps of one token per row run as compiled graphs (`compile_step`), and the engine
    changes the shape of its cache as rarely as it can. Raises UserError if the device or dtype does
    not support `quantize` or `compiled`.
    """

    guesses = 4
    """Largest number of guessed tokens to be read with the next one of a row that is alone. In
    float32 on a CPU, a pass over 5 tokens takes 1.1 times as long as one over a single token."""

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
        model = model.plain()
        self.config = config = model.config
        self.compute_dtype = model.compute_dtype
        self.device = model.device
        self.embedding = model.embedding.weight.to(self.compute_dtype)
        self.shifts: torch.Tensor | None = None
        if config.token_shift:  # what each id adds to the token after it; at the end, for no token
            self.shifts = F.pad(
                model.shift_scale.to(self.compute_dtype) * norm(self.embedding), (0, 0, 0, 1)
            )
        # torch.compile packs weights itself if that is faster.
        self.layers = [_Layer(model, i, quantize, not compiled) for i in range(config.n_layer)]
        head = model.head.weight[: config.vocab_size].to(self.compute_dtype)
        self.head = Product(head, quantize, not compiled)
        self.floor = torch.tensor(-config.softcap, device=self.device)
        self.norm = _fast_norm if self.device.type == "cpu" and _norms_are_large(model) else norm
        self.windows = {layer.window for layer in self.layers}
        self.rotary = {window: self._rotary_table(window > 0) for window in self.windows}
        # Measured where it is on. The fast product in 8 bits multiplies token by token, and so does
        # one in bfloat16 on a CPU that lacks instructions for it.
        if quantize == "int8" or self.device.type != "cpu" or self.compute_dtype != torch.float32:
            self.guesses = 0
        self.compiled_step: Any = None
        if compiled:
            self.compile_step()

    def compile_step(self, **options: Any) -> None:
        """Compile steps of one token per row; `options` are those of torch.compile.

        The default mode is reduce-overhead, which uses CUDA graphs. Each shape of a pinned cache
        has a graph of its own. Steps on other caches are not compiled.
        """
        options = options or {"mode": "reduce-overhead"}
        self.guesses = 0  # steps with guesses would not be compiled
        self.compiled_step = torch.compile(self._step, fullgraph=True, dynamic=False, **options)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Create an empty cache in the compute dtype; UserError beyond the context length."""
        config = self.config
        config.check_length(capacity)
        shape = (config.n_layer, config.n_kv_head, config.head_dim, batch_size, capacity)
        return KVCache(*shape, dtype=self.compute_dtype, device=self.device)

    @torch.no_grad()  # with gradients, oneDNN uses its training kernels: 50 times slower for a row
    def next_logits(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Append ids to the cache; return float32 logits (B, V) after each row's last valid id.

        The first counts[b] of row b of ids (B, T) are valid; by default all are.
        """
        if self.compiled_step is not None and cache.pinned and ids.shape[1] == 1:
            if counts is None:
                counts = torch.ones_like(cache.lengths)
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits have been read
            logits = self.compiled_step(
                ids,
                counts,
                (cache.lengths, cache.last_ids),
                cache.keys,
                cache.values,
                cache.capacity,
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

    @torch.no_grad()
    def logits_after_each(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append ids (B, T) to the cache; return float32 logits (B, T, V) after each of them."""
        return self.logits(self.hidden(ids, cache))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute softcapped float32 logits (..., V) of hidden (..., C)."""
        softcap = self.config.softcap
        # softcap * tanh(x / softcap), by a sigmoid: it takes a quarter of tanh's time on CPUs.
        s = self.head(self.norm(hidden)).float().mul_(2 / softcap).sigmoid_()
        return torch.add(self.floor, s, alpha=2 * softcap)

    def _step(
        self,
        ids: torch.Tensor,
        counts: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor],
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        capacity: int,
    ) -> torch.Tensor:
        """Compute `next_logits` of one token per row, from tensors that are updated in place.

        state: the cache's lengths and last ids.
        """
        lengths, last_ids = state
        _, K, S, _ = keys[0].shape
        reading = plan_reading(lengths, 1, (K, S), capacity, self.windows, self.compute_dtype)
        logits = self.logits(self._layers(ids, last_ids, reading, keys, values)[:, -1])
        lengths.add_(counts)
        keep_last(last_ids, ids, counts)
        return logits

    def hidden(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Append ids to the cache; return the residual stream (B, T, C) after the last layer.

        `logits` turns it into logits.
        """
        T = ids.shape[1]
        reading = cache.read(T, counts, self.windows, self.compute_dtype)
        x = self._layers(ids, cache.last_ids, reading, cache.keys, cache.values)
        cache.advance(ids, counts)
        return x

    def _layers(
        self,
        ids: torch.Tensor,
        last_ids: torch.Tensor,
        reading: Reading,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Run all layers; returns the residual stream (B, T, C) and updates the cache's tensors."""
        B, T = ids.shape
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        tokens, positions = ids.flatten(), reading.positions.flatten()
        rotary = {w: _turns(F.embedding(positions, table)) for w, table in self.rotary.items()}
        single = T == 1 and ids.device.type == "cpu"
        biases = reading.biases
        if single:  # a bias for each row and key/value head, in the dtype of attention
            dtype = torch.float32 if keys[0].numel() <= FLOAT_ELEMENTS else keys[0].dtype
            biases = {
                w: b.to(dtype).expand(B, K, 1, -1).reshape(B * K, 1, -1) for w, b in biases.items()
            }
        x = self.norm(F.embedding(tokens, self.embedding))  # (N, C)
        if self.shifts is not None:
            before = torch.cat((last_ids[:, None], ids[:, :-1]), dim=1).flatten()
            # The last row of the table stands for no token before.
            before = torch.where(before < 0, len(self.shifts) - 1, before)
            x = x + F.embedding(before, self.shifts)
        first = x
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
        """Table (context + 1, 2D): cosines twice, then sines with the sign of their half."""
        config = self.config
        # One more position is for padding that does not fit.
        positions = torch.arange(config.context_length + 1, device=self.device)
        base = config.windowed_rope_base if windowed else config.rope_base
        cos, sin = rope_table(positions, config.head_dim, base)
        return torch.cat((cos, cos, sin, -sin), dim=-1).to(self.compute_dtype)


def _norms_are_large(model: GPT) -> bool:
    """True if RMSNorm's inputs have a root mean square far above 0.001, that of its epsilon.

    This is judged from the weights: the rows of the embedding, and those that compute each head's
    queries and keys of a normed input. The residual scalars must not be close to 0 either, nor the
    token shift to -1.
    """
    D, C = model.config.head_dim, model.config.n_embd
    smallest = [model.embedding.weight[: model.config.vocab_size].square().mean(dim=1).min()]
    if model.config.token_shift:  # a token may follow itself
        smallest.append((1 - model.shift_scale.abs()).clamp(min=0).square().mean())
    for i, block in enumerate(model.blocks):
        attention = cast(Block, block).attention
        for linear in (attention.query, attention.key):
            # With independent inputs of variance 1, a row's product has the variance |row|^2.
            heads = linear.weight.view(-1, D * C)
            smallest.append(heads.square().sum(dim=1).min() / D)
        if model.config.residual_scalars:
            smallest.append(model.residual_scale[i].square() + model.first_scale[i].square())
    return bool(torch.stack(smallest).min() > LEAST_RMS**2)


def _fast_norm(x: torch.Tensor) -> torch.Tensor:
    """Compute RMSNorm without its epsilon, by the CPU kernel for weight normalisation.

    The epsilon changes a vector of root mean square r by 5e-7 / r^2 of its length. For the vectors
    of a trained model (r = 0.7 to 48 at depth 4) that is less than the rounding to float32. A zero
    vector would become NaN; `_norms_are_large` makes sure that there is none.
    """
    C = x.shape[-1]
    root = C**0.5
    rows = x.reshape(-1, C).contiguous()  # the kernel takes the rows for contiguous
    if root % 1:  # the kernel would round this length to the dtype of x
        rows = rows.float()
    lengths = rows.new_full((len(rows), 1), root)
    y = torch._weight_norm_interface(rows, lengths, 0)[0]
    return y.to(x.dtype).view(x.shape)


def _turns(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split rows (N, 2D) of the table into cosines and sines (N, 1, D)."""
    cos, sin = rows[:, None].chunk(2, dim=-1)
    return cos, sin


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate as `apply_rope` does, in three operations; the two halves are swapped by a roll."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _attend_single(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Attend as `attend_cached` does, for one token per row; returns (B * K, G, D).

    q is (B, H, D), bias (B * K, 1, S). The products are in the dtype of bias.
    """
    D = q.shape[-1]
    S = keys.shape[2]
    dtype, result_dtype = bias.dtype, q.dtype
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    q = q.reshape(bias.shape[0], -1, D)
    scores = torch.baddbmm(bias, q, keys.view(-1, S, D).transpose(1, 2), alpha=D**-0.5)
    return torch.bmm(scores.softmax(dim=-1), values.view(-1, S, D)).to(result_dtype)
