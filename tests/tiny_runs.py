"""A tiny corpus and tiny runs of the real stages, for the tests of what spans modules."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from nanochat import runtime
from nanochat.config import (
    BaseConfig,
    Batching,
    Duration,
    Evaluating,
    MidConfig,
    Run,
    Saving,
    SftConfig,
)
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_sft, mid_train, tok_encode

SUBJECTS = ("the king", "a farmer", "the old woman", "my brother", "the small boy")
VERBS = ("gave", "took", "saw", "sent", "kept")
THINGS = ("bread", "seven sheep", "a stone", "the water", "12 cups", "good fruit")
PLACES = ("in the field", "by the sea", "near the town", "on the mountain")

Config = TypeVar("Config", BaseConfig, MidConfig)


def documents(count: int = 120, seed: int = 0) -> list[str]:
    """Short texts of a few words: easily learned, and different from each other."""
    random = Random(seed)
    return [
        " ".join(
            f"{random.choice(SUBJECTS)} {random.choice(VERBS)} {random.choice(THINGS)} "
            f"{random.choice(PLACES)}."
            for _ in range(random.randint(1, 6))
        )
        for _ in range(count)
    ]


@contextmanager
def base_dir(folder: Path) -> Iterator[None]:
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["NANOCHAT_BASE_DIR"]
        else:
            os.environ["NANOCHAT_BASE_DIR"] = before


def encode_corpus(folder: Path) -> None:
    """Text, tokenizer and token stores in `folder`, which then serves as NANOCHAT_BASE_DIR."""
    texts = documents()
    (folder / "text").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text" / "text.jsonl").write_text("\n".join(lines) + "\n")
    with base_dir(folder):
        Tokenizer.train(texts, 320).save()
        tok_encode.main(tok_encode.Config(corpus(folder), workers=1), runtime.single())


def corpus(folder: Path) -> str:
    """The text of an encoded folder. Its path names the store, so copies go on using it."""
    return str(folder / "text")


def base_config(text: str, **changes: Any) -> BaseConfig:
    config = BaseConfig(
        run=Run(device="cpu", dtype="float32"),
        batching=Batching(device_batch_size=2, total_batch_size=512, window=16),
        duration=Duration(num_steps=8),
        evaluating=Evaluating(eval_every=4, eval_tokens=512),
        saving=Saving(save_every=2, keep_last=0),
        depth=2,
        aspect_ratio=16,
        head_dim=16,
        kv_heads=1,
        context_length=64,
        window_pattern="SL",
        corpus=text,
    )
    return changed(config, **changes)


def mid_config(text: str, **changes: Any) -> MidConfig:
    config = MidConfig(
        run=Run(device="cpu", dtype="float32"),
        batching=Batching(device_batch_size=2, total_batch_size=512, window=16),
        duration=Duration(num_steps=6),
        evaluating=Evaluating(eval_every=0, eval_tokens=512),
        saving=Saving(save_every=2, keep_last=0),
        corpus=(text,),
        mix=("arithmetic:60:1", "customjson:0.1"),
    )
    return changed(config, **changes)


def sft_config(text: str, **changes: Any) -> SftConfig:
    mid = mid_config(text)
    config = SftConfig(
        run=mid.run,
        batching=mid.batching,
        duration=mid.duration,
        evaluating=mid.evaluating,
        saving=mid.saving,
        corpus=(text,),
        mix=mid.mix,
        long_conversations="split",  # the first 64 tokens call no tool
    )
    return changed(config, **changes)


def changed(config: Config, **changes: Any) -> Config:
    """`changed(config, batching=dict(window=8), depth=3)`: a dict changes fields of a group."""
    for name, value in changes.items():
        if isinstance(value, dict):
            value = replace(getattr(config, name), **value)
        config = replace(config, **{name: value})
    return config


MAINS = {"base": base_train.main, "mid": mid_train.main, "sft": chat_sft.main}
CONFIGS = {"base": base_config, "mid": mid_config, "sft": sft_config}


def train(stage: str, folder: Path, config: Any, rank: Runtime | None = None) -> Any:
    """Run a stage with NANOCHAT_BASE_DIR set to `folder`."""
    with base_dir(folder):
        return MAINS[stage](config, rank or runtime.single())


def losses(folder: Path, stage: str, tag: str = "default") -> dict[int, Any]:
    """Step -> loss, from metrics.jsonl; where a step appears twice the later line counts."""
    path = folder / "runs" / f"{stage}-{tag}" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["step"]: r.get("loss") for r in records if r["kind"] == "train"}
