"""A nanochat model with all its options, for transformers.

This file is copied into the folder of an exported model and runs there without the nanochat
package. It needs torch and the base classes of transformers only.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

B batch, T time, S keys (the cached ones and the T new ones), C channels, H query heads,
K key/value heads, D head dim, V vocabulary

The model is a decoder with rotary positions, QK-norm, weightless RMSNorm, ReLU^2 MLP (arXiv
2109.08668), grouped-query attention and a logit softcap. Its options are: value embeddings on
alternating layers behind a gate per head (arXiv 2410.17897), scalars per layer on the residual
stream and on the first embedding, a token shift (an embedding gets a share of the one before it,
per channel; arXiv 2305.13048), sliding windows, and another rotary base for windowed layers.
"""

from dataclasses import fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE_FIELD = next(
    field.name
    for field in fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""Name by which this version of transformers expects the cache in outputs (5.24 renamed it)."""


class NanoChatFullConfig(PretrainedConfig):
    """Configuration with transformers' names for the sizes, and further names for the options."""

    model_type = "nanochat_full"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        head_dim: int = 128,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        final_logit_softcapping: float = 15.0,
        rope_base: float = 10000.0,
        windowed_rope_base: float = 10000.0,
        windows: list[int] | None = None,
        value_embedding_layers: list[int] | None = None,
        residual_scalars: bool = False,
        token_shift: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        """Store the settings.

        windows: tokens that a query of each layer sees, its own included; 0: all.
        """
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.final_logit_softcapping = final_logit_softcapping
        self.rope_base = rope_base
        self.windowed_rope_base = windowed_rope_base
        self.windows = windows or [0] * num_hidden_layers
        self.value_embedding_layers = value_embedding_layers or []
        self.residual_scalars = residual_scalars
        self.token_shift = token_shift
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)


class Visibility:
    """Masks of a forward pass: the keys that each query may see, built once per window size."""

    def __init__(
        self,
        attention_mask: torch.Tensor | None,
        past: int,
        T: int,
        documents: torch.Tensor | None = None,
    ):
        """Prepare the masks.

        attention_mask: (B, up to S), 0 on padding; or (B, 1, T, S), as static caches have it.
        documents: number of each token's document, (B or 1, T); None if rows hold one document.
        """
        self.mask, self.past, self.T, self.documents = attention_mask, past, T, documents
        self.no_padding = attention_mask is None or (
            attention_mask.ndim == 2 and bool(attention_mask.all())
        )
        self.masks: dict[int, torch.Tensor | None] = {}

    def follows(self, device: torch.device) -> torch.Tensor:
        """Which of the T new tokens follow another of their document; bool (B or 1, T)."""
        position = torch.arange(self.T, device=device) + self.past
        before = (position - 1).clamp(min=0)
        follows = (position > 0)[None]
        if self.mask is not None and self.mask.ndim == 2:
            follows = follows & self.mask.bool()[:, before]
        elif self.mask is not None:  # what a token may not see of those before it is padding
            seen = self.mask if self.mask.dtype == torch.bool else self.mask == 0
            follows = (
                follows & seen[:, 0].gather(2, before.expand(len(seen), -1)[..., None])[..., 0]
            )
        if self.documents is not None:
            same = self.documents[:, 1:] == self.documents[:, :-1]
            follows = follows & F.pad(same, (1, 0), value=True)
        return follows

    def __call__(self, window: int, S: int, device: torch.device) -> torch.Tensor | None:
        """Mask of a window: bool (B or 1, 1, T, S), True where attended; None: plain causal, or
        all keys if T = 1."""
        if window not in self.masks:
            self.masks[window] = self._build(window, S, device)
        return self.masks[window]

    def _build(self, window: int, S: int, device: torch.device) -> torch.Tensor | None:
        last = self.past + self.T
        everything = self.no_padding and last == S and (window == 0 or window >= S)
        if everything and self.documents is None and (self.T == 1 or self.past == 0):
            return None
        query = torch.arange(self.T, device=device) + self.past
        distance = query[:, None] - torch.arange(S, device=device)  # (T, S)
        visible = distance >= 0
        if window > 0:
            visible = visible & (distance < window)
        visible = visible[None, None]
        if self.mask is not None and self.mask.ndim == 4:
            given = self.mask if self.mask.dtype == torch.bool else self.mask == 0
            visible = visible & given
        elif self.mask is not None and not self.no_padding:
            # A static cache has slots beyond the mask; no query sees them.
            given = F.pad(self.mask.bool(), (0, S - self.mask.shape[1]))
            visible = visible & given[:, None, None, :]
        if self.documents is not None:  # without a cache, so S = T
            visible = visible & (self.documents[:, None, :, None] == self.documents[:, None, None])
        # Padding sees itself, since a softmax over no key is not defined.
        return visible | (distance == 0)


class Attention(nn.Module):
    def __init__(self, config: NanoChatFullConfig, layer_idx: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer_idx, self.head_dim, self.eps = layer_idx, D, config.rms_norm_eps
        self.window = config.windows[layer_idx]
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        if layer_idx in config.value_embedding_layers:
            self.value_gate = nn.Linear(C, K, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        value_embedding: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        visibility: Visibility,
        cache: Any,
    ) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x))[..., None]  # (B, T, K, 1)
            v = v + gate * value_embedding.view_as(v)
        v = v.transpose(1, 2)
        q, k = norm(rotate(q, *rotary), self.eps), norm(rotate(k, *rotary), self.eps)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        mask = visibility(self.window, k.shape[2], k.device)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: NanoChatFullConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)).square())


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NanoChatFullConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *context: Any) -> torch.Tensor:
        x = x + self.self_attn(norm(x, self.eps), *context)
        x = x + self.mlp(norm(x, self.eps))
        return x


class NanoChatFullModel(nn.Module):
    """The layers: from token ids to normalised hidden states."""

    def __init__(self, config: NanoChatFullConfig):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, C)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): nn.Embedding(V, config.num_key_value_heads * config.head_dim)
                for i in config.value_embedding_layers
            }
        )
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.ones(config.num_hidden_layers))
            self.first_scale = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if config.token_shift:
            self.shift_scale = nn.Parameter(torch.zeros(C))

    def shifted(
        self,
        x: torch.Tensor,
        visibility: Visibility,
        cache: Any,
        previous: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add a share of the embedding before it to each embedding of x (B, T, C).

        The first token of a document, or after padding, has none before it. The embedding before
        the first of x is that of the ids `previous` (B,), or else what the cache was given last.
        """
        if previous is not None:
            last = norm(self.embed_tokens(previous)[:, None], self.config.rms_norm_eps)
        elif getattr(cache, "last_embedding", None) is not None:
            last = cache.last_embedding
        elif visibility.past == 0:
            last = torch.zeros_like(x[:, :1])
        else:
            raise ValueError(
                "this cache was filled elsewhere: the model needs the id before input_ids too; "
                "pass it as previous_ids (B,)"
            )
        before = torch.cat((last, x[:, :-1]), dim=1)
        before = before * visibility.follows(x.device)[..., None].to(x.dtype)
        if cache is not None:
            cache.last_embedding = x[:, -1:]
        return x + self.shift_scale * before

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        previous_ids: torch.Tensor | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states (B, T, C) of input_ids (B, T) or inputs_embeds (B, T, C).

        Keywords are those of NanoChatFullForCausalLM.forward.
        """
        for name, value in unknown.items():
            # Values such as output_attentions=False change nothing. The cache itself knows the
            # position, and the last names repeat cu_seq_lens_q.
            known = ("cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
            if name not in known and value is not None and value is not False:
                raise TypeError(
                    f"NanoChatFullForCausalLM.forward does not know {name}={value!r}; "
                    "leave it out (ignoring it could change what the model computes)"
                )
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are the same argument: pass one of them")
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if input_ids is None and self.value_embeddings:
            raise ValueError(
                "inputs_embeds do not say which value embeddings to take: this model needs "
                "input_ids (a model trained with --portable takes either)"
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        documents = None
        if position_ids is not None and T > 1:
            documents = documents_of(position_ids, attention_mask)
        if cu_seq_lens_q is not None:
            found = 1 if documents is None else int((documents[:, -1] + 1).sum())
            if found != len(cu_seq_lens_q) - 1:
                raise ValueError(
                    f"cu_seq_lens_q names {len(cu_seq_lens_q) - 1} documents and position_ids "
                    f"{found}; position_ids must begin anew with each document"
                )
        recomputed = self.training and torch.is_grad_enabled()
        recomputed = recomputed and any(layer.gradient_checkpointing for layer in self.layers)
        if cache is not None and (recomputed or documents is not None):
            raise ValueError(
                "no cache can be filled with gradient checkpointing, nor by rows of several "
                "documents (position_ids that begin anew): leave it out"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None and documents is None and not recomputed:
            cache = DynamicCache()
        # A static cache counts in a tensor that its first layer advances in place; + 0 copies it.
        past = 0 if cache is None else cache.get_seq_length() + 0
        if position_ids is None:
            position_ids = (torch.arange(T, device=x.device) + past)[None]
        visibility = Visibility(attention_mask, past, T, documents)
        x = norm(x, self.config.rms_norm_eps)
        if self.config.token_shift:
            x = self.shifted(x, visibility, cache, previous_ids)
        first = x
        bases = {False: self.config.rope_base, True: self.config.windowed_rope_base}
        rotary = {
            windowed: rotary_table(position_ids, self.config.head_dim, base, x.dtype)
            for windowed, base in bases.items()
        }
        for i, layer in enumerate(self.layers):
            if self.config.residual_scalars:
                x = self.residual_scale[i] * x + self.first_scale[i] * first
            value = None
            if str(i) in self.value_embeddings:
                value = self.value_embeddings[str(i)](input_ids)
            x = layer(x, value, rotary[self.config.windows[i] > 0], visibility, cache)
        x = norm(x, self.config.rms_norm_eps)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE_FIELD: cache})


class NanoChatFullForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoChatFullConfig
    base_model_prefix = "model"
    _no_split_modules = ("DecoderLayer",)
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: NanoChatFullConfig):
        super().__init__(config)
        self.model = NanoChatFullModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *arguments: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Add the id before those that are read next, as beams may have changed places."""
        inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        read = inputs.get("input_ids")
        if self.config.token_shift and read is not None and read.shape[1] < input_ids.shape[1]:
            inputs["previous_ids"] = input_ids[:, -read.shape[1] - 1]
        return inputs

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Compute float32 logits (B, T, V) of input_ids (B, T) or inputs_embeds (B, T, C).

        attention_mask: 0 on padding, which may be on either side. position_ids: (B or 1, T). A
        position that is not larger than the one before it begins another document, which does not
        see the documents before it in its row. cu_seq_lens_q and similar arguments are accepted
        beside position_ids. previous_ids: ids (B,) of the tokens before input_ids; a cache that was
        rearranged since the last call needs them. logits_to_keep: number of last positions (0:
        all), or a tensor of positions. cache and past_key_values are two names of one argument;
        transformers calls it `cache` from 5.24 on. num_items_in_batch and shift_labels are given to
        the loss. Raises TypeError for every other keyword that is set, and ValueError for
        inputs_embeds if the model has value embeddings.
        """
        # shift_labels is not in the signature, where the Trainer would take it for a label.
        shift_labels = others.pop("shift_labels", None)
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cache,
            **others,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(self.lm_head(hidden[:, kept]).float() / cap)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, **{CACHE_FIELD: getattr(output, CACHE_FIELD)}
        )
        return result if return_dict is not False else result.to_tuple()


def documents_of(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Number of each token's document in its row, (B or 1, T); None if rows hold one document.

    A document begins at a position that is not larger than the one before it. The positions of
    padding are ignored.
    """
    T = position_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim != 2:
        return None  # a mask of this form contains everything
    index = torch.arange(T, device=position_ids.device)
    real = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask[:, -T:].bool()
        position_ids = position_ids.expand(real.shape[0], T)
    last = torch.where(real, index, -1).cummax(dim=1).values  # the last real token so far
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    grown = position_ids > position_ids.gather(1, before.clamp(min=0))
    begins = real & (before >= 0) & ~grown
    return begins.cumsum(dim=1) if begins.any() else None


def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of position_ids (B or 1, T), each (B or 1, 1, T, D/2)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids.float()[:, None, :, None] * base ** -(steps / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, heads, T, D) by minus their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
