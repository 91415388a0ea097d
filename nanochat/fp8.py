"""Training with float8 matrix products (`--fp8`), by torchao.

Activations, weights and gradients are scaled, each tensor by its largest value, and cast to float8
right before the products of the blocks' matrices; master weights, optimizer and everything else
stay as they are. So names and checkpoints do not change, and a checkpoint continues with or without
it. Embeddings, head (its loss is one function, in chunks) and the small gates keep their precision.
"""

import torch
import torch.nn as nn

from nanochat.errors import UserError
from nanochat.gpt import GPT

MULTIPLE = 16
"""Of both sides of a matrix: what the GPU's float8 products ask for."""
CAPABILITY = (8, 9)
"""The first CUDA architecture that has them: Ada, Hopper and later."""


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """UserError where --fp8 cannot be."""
    if device.type != "cuda":
        raise UserError(f"--fp8 needs a CUDA GPU, the device is {device.type}; leave --fp8 out")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise UserError(
            f"--fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, "
            f"this one has {capability[0]}.{capability[1]}; leave --fp8 out"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"--fp8 replaces bfloat16, the dtype is {name}; take --dtype bfloat16")


def is_convertible(module: nn.Module, name: str) -> bool:
    return (
        isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and not name.endswith("value_gate")
        and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
    )


def convert_to_fp8(model: GPT, emulate: bool = False) -> int:
    """Let the blocks' matrices multiply in float8; returns how many there are.

    emulate: round to float8 and multiply in the activation dtype, on any device. Raises UserError
    without torchao, and where no matrix has the right shape.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "--fp8 needs torchao, which is not installed: pip install -e '.[fp8]'"
        ) from None
    count = sum(is_convertible(module, name) for name, module in model.named_modules())
    if count == 0:
        raise UserError(
            f"--fp8 finds no matrix whose sides are multiples of {MULTIPLE} at a width of "
            f"{model.config.n_embd}; choose another --depth, --aspect-ratio or --head-dim"
        )
    # pad_inner_dim: the number of tokens need not be a multiple.
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=is_convertible, config=settings)
    return count
