"""One attend() over the backends: packed documents, causal, windows, grouped-query heads.

B batch, T time, S cache slots, H query heads, K key/value heads, G = H / K, D head dim

Backends
- `varlen`: torch.nn.attention.varlen on CUDA from SM80 in bf16/fp16: documents as cumulative
  lengths, so that nothing outside a document is computed.
- `blocked`: matmul and softmax over blocks of queries that each see only the keys up to their own
  end. The path on CPUs, where it trains 1.4-1.7 times faster in bf16 than
  F.scaled_dot_product_attention (which also gains nothing from is_causal there).
- `sdpa`: F.scaled_dot_product_attention everywhere else, and wherever a key/value cache is read.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

QUERY_BLOCK = 128


@dataclass
class Layout:
    """Who may look at whom in a batch; built once, outside the compiled graph."""

    backend: str
    masks: dict[int, torch.Tensor | None]
    """Per window size (0 = none): bool (B, 1, T, T) or (1, 1, T, T), True where attended; None
    stands for plain causal."""
    boundaries: torch.Tensor | None = None
    """varlen: (N,) int32 cumulative document lengths over the flattened B*T tokens."""
    longest: int = 0
    """varlen: an upper bound of the document length."""


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu":
        return "blocked"
    if (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device)[0] >= 8
    ):
        return "varlen"
    return "sdpa"


def make_layout(
    doc_ids: torch.Tensor | None,
    shape: tuple[int, int],
    windows: tuple[int, ...],
    backend: str,
    device: torch.device,
) -> Layout:
    """Build the layout of a (B, T) batch.

    doc_ids: (B, T), equal within a document and non-decreasing along T; None: a row is a document.
    windows: the distinct window sizes in use; a query sees itself and the window-1 tokens before.
    """
    B, T = shape
    if backend == "varlen":
        return Layout(backend, {}, _boundaries(doc_ids, B, T, device), T)
    one_document = doc_ids is None or bool((doc_ids == doc_ids[:, :1]).all())
    masks: dict[int, torch.Tensor | None] = {}
    position = torch.arange(T, device=device)
    distance = position[:, None] - position[None, :]
    for window in set(windows):
        if one_document and (window == 0 or window >= T):
            masks[window] = None
            continue
        visible = distance >= 0
        if window > 0:
            visible = visible & (distance < window)
        visible = visible[None]
        if not one_document and doc_ids is not None:
            visible = visible & (doc_ids[:, :, None] == doc_ids[:, None, :])
        masks[window] = visible[:, None]
    return Layout(backend, masks)


def _boundaries(doc_ids: torch.Tensor | None, B: int, T: int, device: torch.device) -> torch.Tensor:
    """Cumulative document lengths, padded with B*T to a power of two (empty documents are free).

    The padding keeps the number of shapes a compiled graph meets small.
    """
    if doc_ids is None:
        return torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)
    starts = torch.ones(B, T, dtype=torch.bool, device=device)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    offsets = starts.flatten().nonzero().flatten().to(torch.int32)
    size = max(64, 1 << int(offsets.numel()).bit_length())
    return F.pad(offsets, (0, size + 1 - offsets.numel()), value=B * T)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, window: int
) -> torch.Tensor:
    """Causal attention inside documents. q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    if layout.backend == "varlen":
        return _varlen(q, k, v, layout, window)
    mask = layout.masks[window]
    if layout.backend == "blocked":
        return _blocked(q, k, v, mask, window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, window: int
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, D = q.shape
    groups = H // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    boundaries = layout.boundaries
    if boundaries is None:
        raise ValueError("a varlen layout needs boundaries")
    out = varlen_attn(
        q.reshape(B * T, H, D),
        k.reshape(B * T, H, D),
        v.reshape(B * T, H, D),
        boundaries,
        boundaries,
        layout.longest,
        layout.longest,
        window_size=(window - 1 if window > 0 else -1, 0),
    )
    return cast(torch.Tensor, out).view(B, T, H, D)


def _blocked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, window: int
) -> torch.Tensor:
    B, T, H, D = q.shape
    K = k.shape[2]
    q = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4) * D**-0.5  # (B, K, G, T, D)
    keys = k.permute(0, 2, 3, 1)[:, :, None]  # (B, K, 1, D, T)
    values = v.transpose(1, 2)[:, :, None]  # (B, K, 1, T, D)
    if mask is not None:
        mask = mask[:, :, None]  # (B or 1, 1, 1, T, T)
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        first = max(0, start - window + 1) if window > 0 else 0
        scores = q[:, :, :, start:end] @ keys[..., first:end]  # (B, K, G, t, s)
        if mask is not None:
            visible = mask[..., start:end, first:end]
        else:
            # Key first+j is visible to query start+i where j <= i + (start - first).
            visible = torch.ones(end - start, end - first, dtype=torch.bool, device=q.device)
            visible = visible.tril(start - first)
        scores = scores.masked_fill(~visible, float("-inf"))
        outputs.append(scores.softmax(dim=-1) @ values[:, :, :, first:end])
    out = torch.cat(outputs, dim=3)  # (B, K, G, T, D)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def attend_cached(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Attention over a cache. q (B, T, H, D), keys and values (B, K, S, D) -> (B, T, H, D).

    bias (B, 1, T, S) in q's dtype is 0 where attended and -inf elsewhere.
    """
    B, T, H, D = q.shape
    K = keys.shape[1]
    if q.device.type != "cpu":
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=bias, enable_gqa=H != K
        )
        return out.transpose(1, 2)
    # Plain products: F.scaled_dot_product_attention needs 2-6 times as long to decode on a CPU.
    G = H // K
    q = (q * D**-0.5).view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    scores = (q @ keys.transpose(2, 3)).view(B, K, G, T, -1) + bias[:, :, None]
    out = scores.softmax(dim=-1).view(B, K, G * T, -1) @ values
    return out.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
