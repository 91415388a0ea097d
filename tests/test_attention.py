"""attend() against a reference that a person can check by reading it.

B batch, T time, H query heads, K key/value heads, D head dim
"""

import itertools
import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat import attention
from nanochat.attention import (
    QUERY_BLOCK,
    activate_flash_attention,
    attend,
    attend_cached,
    choose_backend,
    make_layout,
)
from nanochat.errors import UserError


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_ids: torch.Tensor | None, window: int
) -> torch.Tensor:
    """One query at a time: softmax over the keys it may see."""
    B, T, H, D = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = h // (H // k.shape[2])
            for t in range(T):
                seen = [
                    s
                    for s in range(t + 1)
                    if (window == 0 or t - s < window)
                    and (doc_ids is None or doc_ids[b, s] == doc_ids[b, t])
                ]
                weights = (k[b, seen, kv] @ q[b, t, h] / math.sqrt(D)).softmax(0)
                out[b, t, h] = weights @ v[b, seen, kv]
    return out


def batched_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_ids: torch.Tensor | None, window: int
) -> torch.Tensor:
    """The same, fast enough for rows of several query blocks (checked against `reference`)."""
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    seen = (distance >= 0) & ((distance < window) if window else torch.tensor(True))
    seen = seen[None].expand(len(q), T, T)
    if doc_ids is not None:
        seen = seen & (doc_ids[:, :, None] == doc_ids[:, None, :])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


B, T, D = 2, 150, 8  # more than one query block, and no multiple of it
WINDOWS = (0, 1, 7, 130, 150, 400)
LAYOUTS: dict[str, Any] = {
    "no ids": lambda T: None,
    "one document": lambda T: torch.zeros(B, T, dtype=torch.int32),
    "packed": lambda T: torch.stack(
        [
            torch.tensor([0] * 5 + [1] * (T - 7) + [2] * 2, dtype=torch.int32),
            (torch.arange(T) // 11).int(),
        ]
    ),
    "one packed row of two": lambda T: torch.stack(
        [torch.zeros(T).int(), (torch.arange(T) >= T // 2).int()]
    ),
    "every token alone": lambda T: torch.arange(T).int().expand(B, T),
}


def random_heads(H: int, K: int, T: int = T, D: int = D, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=generator) for heads in (H, K, K)]


def test_the_fast_reference_equals_the_slow_one() -> None:
    q, k, v = random_heads(4, 2, T=13)
    for make in LAYOUTS.values():
        for window in (0, 1, 4):
            ids = make(13)
            slow, fast = reference(q, k, v, ids, window), batched_reference(q, k, v, ids, window)
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def output_and_gradients(function: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_forward_and_gradients_equal_the_reference(
    backend: str, heads: tuple[int, int], layout: str
) -> None:
    assert T > QUERY_BLOCK
    assert T % QUERY_BLOCK
    q, k, v = random_heads(*heads)
    doc_ids = LAYOUTS[layout](T)
    made = make_layout(doc_ids, (B, T), WINDOWS, backend, torch.device("cpu"))
    for window in WINDOWS:
        expected = output_and_gradients(
            lambda q, k, v, w=window: batched_reference(q, k, v, doc_ids, w), [q, k, v]
        )
        got = output_and_gradients(lambda q, k, v, w=window: attend(q, k, v, made, w), [q, k, v])
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            # Single-key rows have no gradient through their scores: hence an absolute tolerance.
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=2e-5, msg=lambda m, n=name, w=window: f"{n}, window {w}: {m}"
            )
        for dtype, tolerance in ((torch.bfloat16, 0.04), (torch.float16, 0.006)):
            low = [t.to(dtype) for t in (q, k, v)]
            coarse = output_and_gradients(lambda q, k, v, w=window: attend(q, k, v, made, w), low)
            exact = output_and_gradients(
                lambda q, k, v, w=window: batched_reference(q, k, v, doc_ids, w),
                [t.float() for t in low],
            )
            for name, a, b in zip(("out", "dq", "dk", "dv"), coarse, exact, strict=True):
                assert a.dtype == dtype
                error = (a.float() - b).norm() / b.norm().clamp(min=1.0)
                assert error < tolerance, f"{name}, {dtype}, window {window}: {error}"


@pytest.mark.parametrize("length", [1, 2, QUERY_BLOCK, QUERY_BLOCK + 1])
@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_lengths_around_the_block_size(backend: str, length: int) -> None:
    q, k, v = random_heads(2, 1, T=length)
    for make in (LAYOUTS["no ids"], LAYOUTS["every token alone"]):
        ids = make(length)
        layout = make_layout(ids, (B, length), (0, 3), backend, torch.device("cpu"))
        for window in (0, 3):
            torch.testing.assert_close(
                attend(q, k, v, layout, window),
                batched_reference(q, k, v, ids, window),
                rtol=1e-4,
                atol=1e-5,
            )


def test_plain_causal_rows_need_no_mask() -> None:
    """The cheap path is taken where it can be: one document, no window that matters."""
    one = torch.zeros(2, 10, dtype=torch.int32)
    layout = make_layout(one, (2, 10), (0, 10, 4), "sdpa", torch.device("cpu"))
    assert layout.masks[0] is None
    assert layout.masks[10] is None
    assert layout.masks[4] is not None


@pytest.mark.parametrize("products", [("cpu",), ()])
def test_cached_attention_equals_the_reference(
    products: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last queries of a row, over a cache that holds the whole row and garbage after it."""
    monkeypatch.setattr(attention, "PRODUCT_DEVICES", products)
    q, k, v = random_heads(4, 2, T=20)
    garbage = torch.full((B, 2, 4, D), 1e4)
    keys, values = (torch.cat([t.transpose(1, 2), garbage], dim=2) for t in (k, v))
    for window in (0, 5):
        distance = torch.arange(17, 20)[:, None] - torch.arange(24)
        unseen = (distance < 0) | ((distance >= window) if window else torch.tensor(False))
        bias = torch.zeros(3, 24).masked_fill(unseen, -math.inf).expand(B, 1, 3, 24)
        torch.testing.assert_close(
            attend_cached(q[:, 17:], keys, values, bias),
            batched_reference(q, k, v, None, window)[:, 17:],
            rtol=1e-4,
            atol=1e-5,
        )


def test_only_single_tokens_over_a_cache_may_use_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts come in ever new shapes, and cuDNN searches a plan for each."""
    allowed = []

    def kernel(q: torch.Tensor, *_: Any, attn_mask: torch.Tensor, **more: Any) -> torch.Tensor:
        assert not more, "grouped heads are folded: no kernel with a mask but the slowest has them"
        assert q.shape[2] == attn_mask.shape[2]
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    for new in (1, 3):
        with torch.device("meta"):
            q, keys = torch.empty(B, new, 4, D), torch.empty(B, 2, 24, D)
            attend_cached(q, keys, keys, torch.empty(B, 1, new, 24))
    assert allowed == [True, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


# The varlen backend: its layout anywhere, its shapes on meta tensors, its numbers on a GPU.


def test_varlen_boundaries_are_the_documents() -> None:
    doc_ids = LAYOUTS["packed"](T)
    layout = make_layout(doc_ids, (B, T), (0,), "varlen", torch.device("cpu"))
    assert layout.boundaries is not None
    assert layout.boundaries.dtype == torch.int32
    ends = layout.boundaries.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    documents = [5, T - 7, 2] + [11] * (T // 11) + [T % 11]
    assert [n for n in lengths if n] == documents
    assert lengths[: len(documents)] == documents, "empty documents are the padding at the end"
    assert max(lengths) <= layout.longest


def test_varlen_documents_end_with_their_row() -> None:
    """The last document of a row and the first of the next may have the same number."""
    same = torch.zeros(3, 4, dtype=torch.int32)
    for ids in (same, None):
        layout = make_layout(ids, (3, 4), (0,), "varlen", torch.device("cpu"))
        assert layout.boundaries is not None
        assert layout.boundaries.unique().tolist() == [0, 4, 8, 12]


def test_varlen_boundaries_have_few_shapes() -> None:
    """A compiled graph is specialised on the shape: at most one for each doubling of documents."""
    shapes = set()
    for documents in range(1, 129):
        ids = torch.arange(128).clamp(max=documents - 1).expand(2, 128)
        layout = make_layout(ids, (2, 128), (0,), "varlen", torch.device("cpu"))
        assert layout.boundaries is not None
        assert layout.boundaries[0] == 0
        assert layout.boundaries[-1] == 256
        shapes.add(len(layout.boundaries))
    assert len(shapes) <= 4


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [0, 32])
def test_varlen_traces_forward_and_backward_on_meta(heads: tuple[int, int], window: int) -> None:
    meta = torch.device("meta")
    q, k, v = (
        torch.empty(2, 128, H, 64, dtype=torch.bfloat16, device=meta, requires_grad=True)
        for H in (heads[0], heads[1], heads[1])
    )
    layout = make_layout(None, (2, 128), (0, 32), "varlen", meta)
    out = attend(q, k, v, layout, window)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    out.sum().backward()
    for leaf in (q, k, v):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_cuda_equals_the_reference(backend: str, heads: tuple[int, int], layout: str) -> None:
    cuda = torch.device("cuda")
    if backend == "varlen" and choose_backend(cuda, torch.bfloat16) != "varlen":
        pytest.skip("varlen needs SM80")
    low = [t.to(torch.bfloat16) for t in random_heads(*heads, D=64)]
    doc_ids = LAYOUTS[layout](T)
    on_device = None if doc_ids is None else doc_ids.to(cuda)
    made = make_layout(on_device, (B, T), WINDOWS, backend, cuda)
    for window in WINDOWS:
        exact = output_and_gradients(
            lambda q, k, v, w=window: batched_reference(q, k, v, doc_ids, w),
            [t.float() for t in low],
        )

        def on_gpu(*heads: torch.Tensor, w: int = window) -> torch.Tensor:
            q, k, v = (t.to(cuda) for t in heads)
            return attend(q, k, v, made, w).cpu()

        for a, b in zip(output_and_gradients(on_gpu, low), exact, strict=True):
            assert (a.float() - b).norm() / b.norm().clamp(min=1.0) < 0.02


@pytest.mark.cuda
def test_choice_on_cuda() -> None:
    cuda = torch.device("cuda")
    new = torch.cuda.get_device_capability()[0] >= 8
    assert choose_backend(cuda, torch.bfloat16) == ("varlen" if new else "sdpa")
    assert choose_backend(cuda, torch.float32) == "sdpa"


def test_choice_for_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash = [True]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash[0])
    assert choose_backend(cuda, half, 64) == "varlen"
    assert choose_backend(cuda, torch.float32, 20) == "sdpa"
    for size in (20, 264):
        with pytest.raises(UserError, match=f"--head-dim {size}.*multiples of 8"):
            choose_backend(cuda, half, size)
    flash[0] = False  # a build of torch without it
    assert choose_backend(cuda, half, 20) == "sdpa"


@pytest.mark.parametrize(("major", "name"), [(8, None), (9, "FA3"), (10, "FA4")])
def test_newer_flash_attention_is_activated_where_it_is_installed(
    major: int, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert activate_flash_attention(torch.device("cuda")) is None, "nothing is installed"
    for module in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    assert activate_flash_attention(torch.device("cuda")) == name
    assert activated == ([name] if name else [])


def test_choice_on_cpu() -> None:
    assert choose_backend(torch.device("cpu"), torch.bfloat16) == "blocked"
