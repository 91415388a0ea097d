"""Estimate of the memory that training needs, and advice when memory ran out.

B batch, T time, C channels, V vocabulary
"""

import functools
from dataclasses import dataclass, replace

import torch

from nanochat.attention import Layout, padded_documents, query_blocks
from nanochat.config import Learning
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import Machine
from nanochat.loss import block_tokens, chunk_tokens
from nanochat.optim import KINDS

RUNTIME = {"cpu": 380 * 2**20, "cuda": 2**30}
"""Bytes for Python, torch and their libraries; on a GPU, for the allocator's gaps and cuBLAS."""
CUDA_CONTEXT = 512 * 2**20
"""Bytes of GPU memory for kernels and the driver, outside torch's allocator."""
NCCL_BUFFERS = 512 * 2**20
"""Bytes of GPU memory for NCCL's channels to other ranks, outside torch's allocator."""
HOLES = 0.9
"""Unused gaps between activations on a CPU, as a share of the activations of one size. glibc before
2.38 cannot put an aligned block into the gap that a block of the same size left."""


def meta_model(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """Build the model on the meta device: shapes without memory, for counting."""
    with torch.device("meta"):
        return GPT(config, dtype)


@functools.cache
def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Count the parameters of each group without building the model, as `GPT.num_parameters`."""
    return meta_model(config).num_parameters()


@dataclass(frozen=True)
class Shape:
    """Size of a micro-batch, as far as memory depends on it."""

    rows: int
    sequence_length: int
    """Tokens per row."""
    recompute: bool = False
    """True: the backward pass computes the blocks' activations again instead of keeping them."""


@functools.cache
def saved_for_backward(config: GPTConfig, shape: Shape, dtype: torch.dtype, backend: str) -> int:
    """Bytes that autograd keeps between forward and backward pass, without the parameters.

    The loss is computed on meta tensors, and autograd's hooks count what it saves. The estimate
    therefore follows every change of the model.
    """
    rows, T, recompute = shape.rows, shape.sequence_length, shape.recompute
    model = meta_model(config, dtype)
    model.recompute = recompute
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, T, dtype=torch.long, device="meta")
    boundaries = torch.zeros(T + 1, dtype=torch.int32, device="meta")
    mask = torch.ones(rows, 1, T, T, dtype=torch.bool, device="meta")
    windows = {config.window(layer) for layer in range(config.n_layer)}
    begins = torch.zeros(rows, T, dtype=torch.bool, device="meta")
    layout = Layout(backend, begins, dict.fromkeys(windows, mask), boundaries, T)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.summed_loss(ids, ids, ids.float(), layout)
    kept = sum(storage.nbytes() for storage in storages.values())
    if recompute:
        # The blocks' inputs are among what is kept. One block at a time is run again.
        whole = saved_for_backward(config, replace(shape, recompute=False), dtype, backend)
        kept += (whole - kept) // config.n_layer
    return kept


def estimate_memory(
    config: GPTConfig, shape: Shape, machine: Machine, learning: Learning
) -> dict[str, int]:
    """Bytes that a rank needs in training, by kind; the last entry is "total".

    For a GPU this is the device's memory. For a CPU it is all memory of the process, including the
    copy that a checkpoint being written holds. `learning` decides what the optimizer keeps.
    benchmarks/memory.py compares the estimate with real runs on CPUs.
    """
    optimizer = learning.matrix_optimizer
    rows, T, recompute = shape.rows, shape.sequence_length, shape.recompute
    C, V = config.n_embd, config.padded_vocab_size
    device_type, dtype, world_size = machine.device_type, machine.dtype, machine.world_size
    on_cpu = device_type == "cpu"
    counts = parameter_counts(config)
    parameters, matrices = sum(counts.values()), counts["block_matrices"]
    half = dtype.itemsize
    backend = "blocked" if on_cpu else "varlen"
    one, two = (
        saved_for_backward(config, replace(shape, rows=count), dtype, backend) for count in (1, 2)
    )
    per_matrix, per_other = (sum(KINDS[kind].state.values()) for kind in (optimizer, "adamw"))
    shard = 4 * (per_matrix * matrices + per_other * (parameters - matrices)) // world_size
    # The largest share that is updated at once: an MLP's matrices, or one matrix by rows.
    matrix_share = 4 * C * C // world_size
    if KINDS[optimizer].stacked:
        matrix_share = 4 * C * C * -(-config.n_layer // world_size)
    temporaries = 4 * KINDS[optimizer].temporaries * matrix_share
    # The gradient of the head, or of an embedding, before it is added to the existing gradient.
    rows_of_table = max(V, 256 * config.spelling_bytes)
    tables = 4 * max(rows_of_table * C, V * config.n_kv_head * config.head_dim)
    if not on_cpu:  # AdamW updates small blocks on a CPU
        temporaries = max(temporaries, KINDS["adamw"].temporaries * tables / world_size)
    halved = 0  # parameters that travel in bfloat16
    if learning.bf16_transfers and world_size > 1:
        halved = sum(counts[kind] for kind in ("embedding", "value_embeddings", "head"))
    # float32: this rank's rows of the summed gradients. bfloat16: a buffer of all rows, then a
    # copy of this rank's.
    transfers = 2 * halved + (4 * (parameters - halved) + 2 * halved) // world_size
    windows = len({config.window(layer) for layer in range(config.n_layer)})
    # Gradients of the widest part of a block in the backward pass, and masks on CPUs.
    backward = rows * T * (half * 12 * C + (windows * T if on_cpu else 0))
    activations = rows * (two - one) + backward
    if on_cpu:
        seen = [
            (end - start) * (end - first)
            for layer in range(1 if recompute else config.n_layer)
            for start, end, first in query_blocks(T, config.window(layer))
        ]
        probabilities = rows * config.n_head * half * sum(seen)  # blocks differ in size
        activations += int(HOLES * max(0, activations - probabilities))
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer shard": shard,
        "optimizer temporaries": int(temporaries) + (transfers if world_size > 1 else 0),
        "activations": activations,
        "weight casts and the head's gradient": max(0, 2 * one - two) + tables,
        "logits chunk": config.vocab_size
        * (
            half * chunk_tokens(config.vocab_size, device_type)
            + 4 * 4 * block_tokens(config.vocab_size, device_type)
        ),
        "checkpoint copy": 4 * parameters + 3 * shard if on_cpu else 0,
        "runtime": RUNTIME.get(device_type, RUNTIME["cuda"]),
    }
    if halved:
        memory["float32 rows of the tables"] = 4 * halved // world_size
    if not on_cpu:
        memory |= _gpu_memory(config, shape, machine)
    memory["total"] = sum(memory.values())
    return memory


def _gpu_memory(config: GPTConfig, shape: Shape, machine: Machine) -> dict[str, int]:
    """Bytes that a GPU needs and a CPU does not, by kind."""
    tokens, heads = shape.rows * shape.sequence_length, config.n_head * config.head_dim
    # A compiled backward pass returns all gradients together, before they are added up.
    memory = {"gradients of a compiled pass": 4 * sum(parameter_counts(config).values())}
    # float16 is for older GPUs, with masks; on newer ones it has accumulators. Both are counted.
    if machine.dtype != torch.bfloat16:  # masked sdpa: a mask for each window, and one as a bias
        windows = len({config.window(layer) for layer in range(config.n_layer)})
        masks = tokens * shape.sequence_length * (windows + machine.dtype.itemsize)
        memory["attention masks"] = masks
    if machine.dtype != torch.float32:
        # The backward kernel's float32 dq has a block of 128 rows for each document.
        rows = tokens + 128 * padded_documents(0, tokens)
        memory["attention accumulators"] = 4 * rows * heads
    memory["communication buffers"] = NCCL_BUFFERS if machine.world_size > 1 else 0
    memory["CUDA context"] = CUDA_CONTEXT
    return memory


LEARNING = (
    "optimizer temporaries",
    "activations",
    "weight casts and the head's gradient",
    "gradients of a compiled pass",
    "attention accumulators",
    "attention masks",
)
"""Kinds of memory in use only during a step; sampling and evaluation may use that room."""


def decoder_memory(config: GPTConfig, dtype: torch.dtype) -> int:
    """Upper bound of a decoder's bytes: a copy of the weights in the compute dtype.

    In float32 the decoder shares the embedding tables with the model. A model with spelled
    embeddings gives it an embedding table of its own.
    """
    counts = parameter_counts(replace(config, spelling_bytes=0))
    parameters = sum(counts.values())
    if dtype == torch.float32:
        parameters -= counts["value_embeddings"]
        parameters -= 0 if config.spelling_bytes else counts["embedding"]
    return parameters * dtype.itemsize


def cache_memory(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes of a decoding cache that holds one full context."""
    row = config.n_layer * config.n_kv_head * config.head_dim * config.context_length
    return 2 * row * dtype.itemsize


def largest_batch(
    config: GPTConfig,
    machine: Machine,
    sequence_length: int,
    learning: Learning,
    recompute: bool = False,
) -> int:
    """Largest power of two of rows, up to 4,096, that fits the limit; 0 if not one row does."""
    rows, trial = 0, 1
    while trial <= 4096:
        shape = Shape(trial, sequence_length, recompute)
        needed = estimate_memory(config, shape, machine, learning)["total"]
        if machine.memory_limit is not None and needed > machine.memory_limit:
            break
        rows, trial = trial, trial * 2
    return rows


def memory_advice(
    config: GPTConfig,
    shape: Shape,
    machine: Machine,
    learning: Learning,
    *,
    rows_per_step: int,
    fits: int,
) -> str:
    """Advise which flags to set after training ran out of memory with this shape.

    The advice is fewer rows: the most that divide the rank's `rows_per_step` and, by the plan, fit
    the limit (`fits`, from `largest_batch`). If --recompute is off, the advice names it too.
    """

    def gibibytes(shape: Shape) -> str:
        return f"{estimate_memory(config, shape, machine, learning)['total'] / 2**30:.1f} GiB"

    fewer = [r for r in range(1, min(fits, shape.rows - 1) + 1) if rows_per_step % r == 0]
    remedies = []
    if fewer:
        needed = gibibytes(replace(shape, rows=fewer[-1]))
        remedies.append(f"--device-batch-size {fewer[-1]} ({needed})")
    if not shape.recompute:
        remedies.append(f"--recompute ({gibibytes(replace(shape, recompute=True))})")
    if not fewer:
        remedies.append("a smaller model or shorter rows")
    limit = machine.memory_limit
    plan = f"{fits} rows fit {limit / 2**30:.1f} GiB by the plan" if limit else "no limit is known"
    return (
        f"--device-batch-size {shape.rows} with rows of {shape.sequence_length} tokens was planned "
        f"to need {gibibytes(shape)}, and {plan}; set {' or '.join(remedies)}"
    )
