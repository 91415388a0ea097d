"""Training with float8 matrix products (`--fp8`), by torchao.

Right before the products of the blocks' matrices, activations, weights and gradients are scaled
(each tensor by its largest value) and cast to float8. Master weights, optimizer, parameter names
and checkpoints do not change, so a run may be resumed with or without `--fp8`. Embeddings, the head
(whose loss is one function, in chunks) and the small gates keep their precision.
"""

import torch
import torch.nn as nn

from nanochat.errors import UserError
from nanochat.gpt import GPT

MULTIPLE = 16
"""Number that must divide both sides of a matrix, for the GPU's float8 products."""
CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with float8 products (Ada; Hopper and later have them)."""


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the device or the dtype does not allow --fp8."""
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
    """Make the blocks' matrices multiply in float8; returns how many matrices do.

    emulate: round to float8 but multiply in the activation dtype, on any device. Raises UserError
    if torchao is missing or no matrix has the right shape.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "--fp8 needs torchao, which is not installed; install it: pip install -e '.[fp8]'"
        ) from None
    count = sum(is_convertible(module, name) for name, module in model.named_modules())
    if count == 0:
        raise UserError(
            f"--fp8 finds no matrix whose sides are multiples of {MULTIPLE} at a width of "
            f"{model.config.n_embd}; choose another --depth, --aspect-ratio or --head-dim"
        )
    # pad_inner_dim allows any number of tokens.
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=is_convertible, config=settings)
    return count
