"""Compiled training: one graph without breaks, compiled again only where it must be.

The graph is captured as for any backend but run without generating code, which would take minutes.
B batch, T time
"""

import functools
import operator
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import words
from nanochat import loss, runtime
from nanochat.config import Learning
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.optim import Hypers, Optimizer, parameter_rules
from nanochat.rl.rows import Sample, pack_samples
from nanochat.train import Batch, LossScale, train_step

CONFIG = GPTConfig(
    vocab_size=60,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=16,
    head_dim=8,
    context_length=12,
    windows=(4, 0),
)
B, T = 2, 12
RUNTIME = runtime.single()


COMPILE = torch.compile


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile captures graphs, and runs them as they are."""
    torch._dynamo.reset()
    counters.clear()
    loss._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    yield
    torch._dynamo.reset()
    loss._compiled.cache_clear()


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def compiled(**changes: Any) -> tuple[GPT, Optimizer]:
    model = GPT(CONFIG, changes.pop("dtype", torch.float32)).init_weights(
        0, words(CONFIG.vocab_size)
    )
    for name, value in changes.items():
        setattr(model, name, value)
    optimizer = Optimizer(
        model, parameter_rules(model, Learning(), width=16), muon_dtype=torch.float32
    )
    model.compile_loss()
    return model, optimizer


def batch(seed: int, one_document: bool = False) -> Batch:
    """Random documents, targets and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (B, T + 1), generator=generator)
    starts = torch.randint(0, 3, (B, T), generator=generator) == 0
    masked = torch.randint(0, 4, (B, T), generator=generator) == 0
    return Batch(
        inputs=ids[:, :-1].contiguous(),
        targets=torch.where(masked, -1, ids[:, 1:]),
        weights=torch.rand(B, T, generator=generator),
        doc_ids=torch.zeros(B, T, dtype=torch.int32) if one_document else starts.cumsum(1).int(),
    )


def test_compiled_steps_are_the_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are traced here, down to the operations a code generator gets."""
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="aot_eager"))
    results = []
    for compile_it in (False, True):
        model, optimizer = compiled()
        if not compile_it:
            model.token_losses, model.summed_loss = model._token_losses, model._summed_loss
        losses = [
            train_step(model, optimizer, [batch(i)], Hypers(0.1), RUNTIME).loss for i in range(4)
        ]
        results.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("recompute", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_documents_rates_and_steps_do_not_compile_again(
    recompute: bool, dtype: torch.dtype
) -> None:
    model, optimizer = compiled(recompute=recompute, dtype=dtype)
    for step in range(8):
        hypers = Hypers(lr_multiplier=0.1 / (step + 1), momentum=0.85 + 0.01 * step)
        batches = [batch(10 * step + i) for i in range(1 + step % 2)]
        train_step(model, optimizer, batches, hypers, RUNTIME)
    assert graphs() == 2, "the model, and what is done to the logits"
    # Rows of one document need no mask: the one other kind of layout.
    for step in range(8):
        train_step(model, optimizer, [batch(step, step % 2 == 0)], Hypers(0.1), RUNTIME)
    assert graphs() == 3


def test_evaluation_between_steps_compiles_once() -> None:
    model, optimizer = compiled()
    for step in range(3):
        train_step(model, optimizer, [batch(step)], Hypers(0.1), RUNTIME)
        with torch.no_grad():
            data = batch(100 + step)
            model.nll(data.inputs, data.targets, data.doc_ids)
    assert graphs() == 4


def test_float16_with_a_moving_loss_scale() -> None:
    model, optimizer = compiled(dtype=torch.float16)
    scale = LossScale(2.0**16, growth_interval=2)
    for step in range(6):
        train_step(model, optimizer, [batch(step)], Hypers(0.1), RUNTIME, scale)
    assert scale.scale > 2.0**16
    assert graphs() == 2


def test_rollouts_of_any_number_do_not_compile_again() -> None:
    model, optimizer = compiled()
    for step in range(6):
        samples = [Sample(list(range(2 + i % 9)), [1] * (2 + i % 9)) for i in range(3 + 5 * step)]
        rows = pack_samples(samples, T, B, RUNTIME.device, fill_up=True)
        advantages = torch.linspace(-1, 1, len(samples))
        batches = [r.weighted(advantages) for r in rows]
        train_step(model, optimizer, batches, Hypers(0.1), RUNTIME, temperature=0.8, divisor=9)
    assert graphs() == 4, "a whole micro-batch, and a half"


def test_all_stages_without_a_break(encoded: Path, tmp_path: Path) -> None:
    """The real scripts on the real loader: documents differ in every batch."""
    shutil.copytree(encoded, tmp_path / "run")
    for stage in ("base", "mid", "sft"):
        torch._dynamo.reset()
        counters.clear()
        config = tiny_runs.CONFIGS[stage](
            tiny_runs.corpus(encoded),
            run={"compile": "on"},
            duration={"num_steps": 4, "epochs": None},
            evaluating={"eval_every": 2},
            saving={"save_every": 0},
        )
        assert tiny_runs.train(stage, tmp_path / "run", config).finished
        # Training and evaluation, each with and without a row that holds several documents, and
        # what each does to the logits.
        assert 4 <= graphs() <= 6, stage


# What is done to the logits of a compiled model


def both_losses(fused: bool, dtype: torch.dtype, temperature: float) -> list[torch.Tensor]:
    """Sum, losses and gradients of a head, with ignored targets and weights of any sign."""
    N, C, V = 150, 16, 50
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, V, (N,), generator=generator)
    weights = torch.randn(N, generator=generator)
    hidden = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(64, C, generator=generator).requires_grad_()
    settings = (5.0, V, temperature, fused)
    total = loss.summed_softcapped_loss(hidden, weight, targets, weights, *settings)[0]
    token_losses = loss.softcapped_losses(hidden, weight, targets, *settings)
    results = [total, token_losses]
    for value in (total, (weights * token_losses).sum()):
        results += torch.autograd.grad(value, (hidden, weight))
    return results


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_head_is_the_eager_one(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks of 64, 64 and 22 tokens; the eager one has blocks of 16."""
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="aot_eager"))
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "cpu", 1)
    monkeypatch.setitem(loss.LOGITS_PER_BLOCK, "cpu", 1)
    eager, fused = (both_losses(fused, dtype, temperature) for fused in (False, True))
    assert graphs() == 4, "two functions in two shapes"
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for a, b in zip(eager, fused, strict=True):
        torch.testing.assert_close(b, a, **close)


def test_a_compiled_model_has_a_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not compiled, or no longer, has none."""
    seen: list[str] = []

    def spied(function: Any) -> Any:
        seen.append(function.__name__)
        return function

    model, _ = compiled()
    data = batch(0)
    with monkeypatch.context() as patch:
        patch.setattr(loss, "_compiled", spied)
        for _ in range(2):
            model.weighted_loss(data.inputs, data.targets, data.weights, data.doc_ids).backward()  # type: ignore[no-untyped-call]
            model.nll(data.inputs, data.targets, data.doc_ids)
            assert seen == ["_to_gradient_fused", "_log_probabilities"]
            model.token_losses, model.summed_loss = model._token_losses, model._summed_loss


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["_to_gradient_fused", "_log_probabilities"])
def test_generated_code_is_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code reads the logits and writes over them."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(torch, "compile", COMPILE)
    generator = torch.Generator().manual_seed(0)
    t, V = 24, 1000
    logits = torch.randn(t, V, generator=generator).bfloat16()
    targets = torch.randint(0, V, (t, 1), generator=generator)
    twin = logits.clone()
    chosen, (code,) = run_and_get_code(loss._compiled(getattr(loss, name)), logits, targets, 15.0)
    eager = getattr(loss, name.removesuffix("_fused"))
    torch.testing.assert_close(chosen, eager(twin, targets, 15.0))
    torch.testing.assert_close(logits, twin)
    (call,) = re.findall(r"^ +cpp_fused\w+\((.*)\)$", code, re.MULTILINE)
    assert call.count("arg0_1") == (2 if name == "_to_gradient_fused" else 1), "read, and written"


# The head at a real vocabulary, without the memory it would need.

TOKENS, VOCABULARY = 65536, 65536


def alive_at_once(graph: torch.fx.Graph) -> int:
    """Bytes of the graph's own results at the node where most of them are still needed."""
    last_use: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            last_use[argument] = node
    size: dict[torch.fx.Node, int] = {}
    most = 0
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and node.target is not operator.getitem:
            leaves = tree_leaves(node.meta.get("val"))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            size[node] = sum(t.numel() * t.element_size() for t in tensors)
        most = max(most, sum(size.values()))
        for argument in node.all_input_nodes:
            if last_use[argument] is node:
                size.pop(argument, None)
    return most


class Peak(TorchDispatchMode):
    """The most bytes that results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.seen: set[int] = set()

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    weakref.finalize(storage, self.freed, key, size)
        self.most = max(self.most, self.now)
        return result


@pytest.mark.parametrize("function", ["summed_loss", "token_losses"])
def test_compiling_keeps_the_chunks_of_the_head(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generated graphs hold the head's gradients and no logits: chunks stay inside."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=backend))
    config = config_from_depth(2, VOCABULARY, portable=True, head_dim=64, context_length=2048)
    with torch.device("meta"):
        model = GPT(config, torch.bfloat16)
        model.backend = "varlen"
        model.compile_loss()
        ids = torch.zeros(TOKENS // 2048, 2048, dtype=torch.long)
    if function == "summed_loss":
        model.weighted_loss(ids, ids, torch.ones_like(ids, dtype=torch.float32)).backward()
    else:
        model.nll(ids, ids).sum().backward()
    assert len(graphs) == 2
    largest = max(
        leaf.numel()
        for graph in graphs
        for node in graph.nodes
        for leaf in tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
    )
    assert largest <= max(config.padded_vocab_size, TOKENS * 4) * config.n_embd
    table = 4 * config.padded_vocab_size * config.n_embd
    # The trunk's activations, in bfloat16, and the tables' gradients on their way.
    activations = 2 * TOKENS * config.n_embd * 2 * 30
    assert max(map(alive_at_once, graphs)) <= activations + 6 * table


def test_the_head_holds_one_chunk_and_its_gradients() -> None:
    C = 1280
    with torch.device("meta"):
        hidden = torch.empty(TOKENS, C, dtype=torch.bfloat16)
        weight = torch.empty(VOCABULARY, C)
        targets = torch.zeros(TOKENS, dtype=torch.long)
        weights = torch.ones(TOKENS)
    head = 4 * VOCABULARY * C
    chunk = 2 * loss.LOGITS_PER_CHUNK["cuda"] + 4 * 4 * loss.LOGITS_PER_BLOCK["cuda"]
    with Peak() as peak:
        # The operator itself would only make up the shapes of its results on meta tensors.
        function = loss.summed_softcapped_loss._init_fn
        function(hidden, weight, targets, weights, 15.0, VOCABULARY, 1.0)
    # The head's gradient, the cast weight, the chunk's product; hidden states scaled and derived.
    gradients = head + 2 * head // 2 + 4 * 2 * TOKENS * C
    assert peak.most <= 1.5 * chunk + gradients
    assert peak.most > chunk, "the logits of a chunk were seen"
