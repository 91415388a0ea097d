"""Causal attention inside packed documents, with windows and grouped-query heads.

B batch, T time, S cache slots, H query heads, K key/value heads, G = H / K, D head dim

`attend` chooses one of three backends:
- `varlen`: torch.nn.attention.varlen, on CUDA from SM80 in bf16/fp16. It takes documents as
  cumulative lengths, so that nothing outside a document is computed.
- `blocked`: matmul and softmax over blocks of queries. Each block reads only the keys up to its
  own end. Used on CPUs, where it trains 1.4-1.7 times faster in bf16 than
  F.scaled_dot_product_attention (which also gains nothing from is_causal there).
- `sdpa`: F.scaled_dot_product_attention, used everywhere else.

`attend_cached` reads a key/value cache with plain matrix products.
"""

import contextlib
import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.errors import UserError

QUERY_BLOCK = 128

PRODUCT_DEVICES = ("cpu",)
"""Devices that attend over a cache by plain products. F.scaled_dot_product_attention takes 2-6
times as long on a CPU."""

KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that take masks and need no plan for a shape."""


@dataclass
class Layout:
    """The pairs of positions that may see each other in a batch; built once a batch.

    It is built outside the compiled graph, which therefore never changes with the documents.
    """

    backend: str
    begins: torch.Tensor
    """True at the first token of a document in its row, bool (B, T) or (1, T)."""
    masks: dict[int, torch.Tensor | None]
    """Masks by window size (0: no window), bool (B, 1, T, T) or (1, 1, T, T), True where attended.
    None stands for plain causal attention."""
    boundaries: torch.Tensor | None = None
    """Cumulative document lengths over the flattened B*T tokens, int32; for `varlen` only."""
    longest: int = 0
    """Upper bound of the documents' lengths, in tokens; for `varlen` only."""


FLASH_HEADS = range(8, 257, 8)
"""Head sizes that flash attention takes."""


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> str:
    """Name the device's fastest backend; UserError for a head size that its kernel refuses."""
    if device.type == "cpu":
        return "blocked"
    if (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device)[0] >= 8
        and torch.backends.cuda.is_flash_attention_available()
    ):
        if head_dim not in FLASH_HEADS:
            raise UserError(
                f"--head-dim {head_dim}: attention on this GPU takes multiples of 8 from 8 to 256; "
                "choose another one, or --dtype float32 (slower)"
            )
        return "varlen"
    return "sdpa"


def activate_flash_attention(device: torch.device) -> str | None:
    """Let torch use FlashAttention 3 (Hopper) or 4 (Blackwell) if it is installed.

    Returns its name, or None if torch goes on with its own FlashAttention 2.
    """
    name, module = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}.get(
        torch.cuda.get_device_capability(device)[0], ("", "")
    )
    if not name:
        return None
    try:
        importlib.import_module(module)
        torch.nn.attention.activate_flash_attention_impl(name)
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None  # not installed, or not what this torch expects
    return name


def make_layout(
    doc_ids: torch.Tensor | None,
    shape: tuple[int, int],
    windows: tuple[int, ...],
    backend: str,
    device: torch.device,
    boundaries: torch.Tensor | None = None,
) -> Layout:
    """Build the layout of a (B, T) batch.

    doc_ids: (B, T), equal within a document and non-decreasing along T; None: each row is one
    document. windows: the distinct window sizes in use; a query sees itself and the window-1
    tokens before it. boundaries: `document_boundaries` of doc_ids if known; finding them in
    doc_ids makes the host wait for the GPU.
    """
    B, T = shape
    begins = first_tokens(torch.zeros(1, T, device=device) if doc_ids is None else doc_ids)
    if backend == "varlen":
        if boundaries is None and doc_ids is None:
            boundaries = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)
        elif boundaries is None and doc_ids is not None:
            ends = document_boundaries(doc_ids)
            boundaries = pad_boundaries(ends, padded_documents(len(ends) - 1, B * T))
        return Layout(backend, begins, {}, boundaries, T)
    # To ask a GPU would be to wait for it.
    one_document = doc_ids is None or (device.type == "cpu" and not begins[:, 1:].any())
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
    return Layout(backend, begins, masks)


def first_tokens(doc_ids: torch.Tensor) -> torch.Tensor:
    """Mark each row's first token of a document, bool (B, T).

    >>> first_tokens(torch.tensor([[0, 0, 1], [0, 0, 0]])).int().tolist()
    [[1, 0, 1], [1, 0, 0]]
    """
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)


def document_boundaries(doc_ids: torch.Tensor) -> torch.Tensor:
    """Starts of the documents in the flattened rows of doc_ids (B, T), then B*T, int32.

    >>> document_boundaries(torch.tensor([[0, 0, 1], [0, 0, 0]]))
    tensor([0, 2, 3, 6], dtype=torch.int32)
    """
    offsets = first_tokens(doc_ids).flatten().nonzero().flatten().to(torch.int32)
    return F.pad(offsets, (0, 1), value=doc_ids.numel())


def padded_documents(documents: int, tokens: int) -> int:
    """Length of a batch's padded boundaries, in documents: a power of two.

    It is at least 64, and at least one document per 512 tokens. Text from the web stays below that,
    so that a compiled graph meets one shape. Attention kernels start blocks for empty documents
    too, so more room would cost time.
    """
    return 1 << (max(64, tokens // 512, documents) - 1).bit_length()


def pad_boundaries(boundaries: torch.Tensor, documents: int) -> torch.Tensor:
    """Append empty documents to boundaries until they have shape (documents + 1,)."""
    missing = documents + 1 - len(boundaries)
    return torch.cat([boundaries, boundaries[-1:].expand(missing)])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, window: int
) -> torch.Tensor:
    """Causal attention inside documents: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    if layout.backend == "varlen":
        return _varlen(q, k, v, layout, window)
    mask = layout.masks[window]
    if layout.backend == "blocked":
        return BlockedAttention.apply(  # type: ignore[no-untyped-call]
            q, k, v, mask, window
        )
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
    keywords: dict[str, Any] = {}
    if groups > 1 and _varlen_groups_heads():
        keywords["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    boundaries = layout.boundaries
    if boundaries is None:
        raise ValueError("a varlen layout needs boundaries")
    out = varlen_attn(
        q.reshape(B * T, H, D),
        k.reshape(B * T, -1, D),
        v.reshape(B * T, -1, D),
        boundaries,
        boundaries,
        layout.longest,
        layout.longest,
        window_size=(window - 1 if window > 0 else -1, 0),
        **keywords,
    )
    return cast(torch.Tensor, out).view(B, T, H, D)


@functools.cache
def _varlen_groups_heads() -> bool:
    """True if torch's kernel shares keys and values between heads itself (from 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class BlockedAttention(torch.autograd.Function):
    """Attention over blocks of queries, each against the keys from its window to its own end.

    q is (B, T, H, D), k and v (B, T, K, D), mask bool (B or 1, 1, T, T), or None for plain causal
    attention; the result is (B, T, H, D). The probabilities are kept for the backward pass. That
    pass adds each block's part to the gradients of keys and values in place; autograd would copy
    the whole gradients for every block.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        window: int,
    ) -> torch.Tensor:
        B, T, H, D = q.shape
        K, G = k.shape[2], H // k.shape[2]
        queries = (q * D**-0.5).view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B * K, G, T, D)
        keys = k.transpose(1, 2).reshape(B * K, T, D)
        values = v.transpose(1, 2).reshape(B * K, T, D)
        out = torch.empty_like(queries)
        probabilities = []
        for start, end, first in query_blocks(T, window):
            t, s = end - start, end - first
            block = queries[:, :, start:end].reshape(B * K, G * t, D)
            scores = torch.bmm(block, keys[:, first:end].transpose(1, 2))  # (B*K, G*t, s)
            if mask is not None:
                hidden = ~mask[:, :, start:end, first:end]
                scores.view(B, K * G, t, s).masked_fill_(hidden, float("-inf"))
            else:  # only the last t keys are partly in the future
                hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
                scores.view(-1, t, s)[:, :, s - t :].masked_fill_(hidden, float("-inf"))
            probabilities.append(scores.softmax(dim=-1))
            result = torch.bmm(probabilities[-1], values[:, first:end])
            out[:, :, start:end] = result.view(B * K, G, t, D)
        ctx.save_for_backward(queries, keys, values, *probabilities)
        ctx.window, ctx.shape = window, (B, T, K, G, D)  # type: ignore[attr-defined]
        return out.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, *probabilities = ctx.saved_tensors  # type: ignore[attr-defined]
        B, T, K, G, D = ctx.shape  # type: ignore[attr-defined]
        grad = grad_output.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B * K, G, T, D)
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        blocks = query_blocks(T, ctx.window)  # type: ignore[attr-defined]
        for (start, end, first), p in zip(blocks, probabilities, strict=True):
            t = end - start
            block = queries[:, :, start:end].reshape(B * K, G * t, D)
            g = grad[:, :, start:end].reshape(B * K, G * t, D)
            grad_p = torch.bmm(g, values[:, first:end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            result = torch.bmm(grad_scores, keys[:, first:end]).view(B * K, G, t, D)
            grad_queries[:, :, start:end] = result
            grad_keys[:, first:end].baddbmm_(grad_scores.transpose(1, 2), block)
            grad_values[:, first:end].baddbmm_(p.transpose(1, 2), g)
        grad_q = grad_queries.mul_(D**-0.5).view(B, K, G, T, D).permute(0, 3, 1, 2, 4)
        return (
            grad_q.reshape(B, T, K * G, D),
            grad_keys.view(B, K, T, D).transpose(1, 2),
            grad_values.view(B, K, T, D).transpose(1, 2),
            None,
            None,
        )


def query_blocks(T: int, window: int) -> list[tuple[int, int, int]]:
    """List (first query, end, first key) of each block; a block's keys also stop at its end."""
    return [
        (start, min(start + QUERY_BLOCK, T), max(0, start - window + 1) if window > 0 else 0)
        for start in range(0, T, QUERY_BLOCK)
    ]


def attend_cached(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Attention over a cache: q (B, T, H, D), keys and values (B, K, S, D) -> (B, T, H, D).

    bias (B, 1, T, S) in q's dtype is 0 where attended and -inf elsewhere.
    """
    B, T, H, D = q.shape
    K = keys.shape[1]
    G = H // K
    out: torch.Tensor
    # The queries that share a key/value head are further queries of that head.
    q = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    if q.device.type in PRODUCT_DEVICES:
        scores = ((q * D**-0.5) @ keys.transpose(2, 3)).view(B, K, G, T, -1) + bias[:, :, None]
        out = scores.softmax(dim=-1).view(B, K, G * T, -1) @ values
    else:
        # cuDNN searches a plan for every new shape, which takes up to half a second. Single tokens
        # come in few shapes (`rows.Slots`), prompts and options in very many.
        with sdpa_kernel(KERNELS) if T > 1 else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=bias.repeat(1, 1, G, 1) if G > 1 else bias
            )
    return out.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
