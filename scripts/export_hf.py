"""Export a model for transformers.

Models trained with --portable become transformers' own `nanochat` type. The folders of other models
contain their code, and they are loaded with trust_remote_code=True. Before the folder gets its
name, it is loaded with transformers and compared with the checkpoint, logit by logit. This script
needs the extra `hf`.

Example:
    python -m scripts.export_hf --source sft --out my-model
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat import paths
from nanochat.checkpoint_manager import load_model
from nanochat.cli import launch
from nanochat.errors import UserError
from nanochat.export import hf
from nanochat.runtime import DTYPES, Runtime, single


@dataclass(frozen=True)
class Config:
    source: str = "sft"
    """A stage (base, mid, sft, rl), stage/tag, or a checkpoint folder."""
    step: int | None = None
    """The checkpoint's step; default: the newest."""
    out: Path | None = None
    """Folder to write; default: NANOCHAT_BASE_DIR/export/<stage>-<tag>, with -mlx for mlx."""
    weights: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the saved weights; float32 is exact."""
    names: Literal["transformers", "mlx"] = "transformers"
    """Names of the tensors: transformers', or those of mlx-lm on Apple silicon (--portable models
    only)."""
    check: bool = True
    """Load the written folder and compare it with the checkpoint."""
    texts: int = 10_000
    """Number of random texts on which the tokenizers are compared."""
    device: Literal["cpu"] = "cpu"
    """Device of the comparison, which runs in float32."""


def main(cfg: Config, runtime: Runtime) -> Path:
    """Returns the folder that was written."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("export needs transformers; pip install -e '.[hf]'") from error
    transformers.utils.logging.disable_progress_bar()  # the check loads what was just written
    model, tokenizer, meta = load_model(cfg.source, single(), step=cfg.step)
    suffix = "" if cfg.names == "transformers" else f"-{cfg.names}"
    folder = cfg.out or paths.base_dir() / "export" / f"{meta['stage']}-{meta['tag']}{suffix}"
    texts = cfg.texts if cfg.check else None
    result = hf.export(
        model,
        tokenizer,
        folder,
        dtype=DTYPES[cfg.weights],
        meta=meta,
        texts=texts,
        names=cfg.names,
    )
    kind = "nanochat" if model.config.is_portable else "nanochat_full, with its own code"
    runtime.print(f"written: {folder} (model type {kind}; names of {cfg.names})")
    if result is not None:
        runtime.print(
            f"loaded by transformers: logits within {result.largest_difference:.1e}, "
            f"{result.texts:,} random texts and the special tokens encoded alike"
        )
    return folder


if __name__ == "__main__":
    launch(main, Config, __doc__)
