"""Show rows that a model is trained on, token by token, from the real loader.

Examples:
    python -m scripts.show_batch --stage sft
    python -m scripts.show_batch --stage mid --task gsm8k --html gsm8k.html

Colours show the tokens' loss weights. Sources and settings are those of the checkpoint of this
stage and tag, or the stage's defaults if there is none; flags override them. A store that does not
exist yet is built, which takes a while for large tasks.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from nanochat import paths
from nanochat.checkpoint_manager import latest, read_meta
from nanochat.cli import launch
from nanochat.config import BaseConfig, MidConfig, SftConfig, from_dict
from nanochat.data.conversations import conversations_store, fit_conversations
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source, pretraining_sources
from nanochat.data.store import TokenStore
from nanochat.errors import UserError
from nanochat.report.batch import View, build_view, print_view, render_html
from nanochat.rl.dpo import pairs_store
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from tasks import registry
from tasks.sources import build_sources

StageName = Literal["base", "mid", "sft"]
_CONFIGS = {"base": BaseConfig, "mid": MidConfig, "sft": SftConfig}


@dataclass(frozen=True)
class Settings:
    """Settings in place of those of the stage's run."""

    corpus: tuple[str, ...] = ()
    """Pretraining corpus, instead of the stage's; several by share for mid and sft."""
    mix: tuple[str, ...] = ()
    """Mixture, instead of the stage's."""
    replay: float | None = None
    """Share of replayed text, instead of the stage's."""
    prompt_weight: float | None = None
    """Loss weight of tokens the assistant does not produce, instead of the stage's."""
    sequence_length: int | None = None
    """Tokens per row, instead of the model's context length."""
    seed: int | None = None
    """Seed of the data order, instead of the stage's."""


@dataclass(frozen=True)
class Config:
    settings: Settings = field(default_factory=Settings)
    stage: StageName = "sft"
    """Stage whose rows to show: base, mid or sft."""
    task: str | None = None
    """Show only this task, named as in --mix: gsm8k, arc:easy, spellingbee:1000 (mid and sft)."""
    tokenizer: str = "default"
    """Name that scripts.tok_train gave the tokenizer."""
    store: Path | None = None
    """Show only this token store."""
    pairs: Path | None = None
    """Show only this file of pairs, as chat_rl --algo dpo --pairs reads it."""
    split: Literal["train", "val"] = "train"
    """Split of the data."""
    rows: int = 3
    """Rows to show."""
    skip: int = 0
    """Rows to skip first."""
    html: Path | None = None
    """File for an HTML page, which is written instead of printing."""
    tag: str = "default"
    """Tag of the run whose settings to take, if it has a checkpoint."""


def stage_settings(cfg: Config) -> tuple[BaseConfig | MidConfig, int | None, str]:
    """Configuration of the stage, its context length if known, and their origin in words."""
    config_class = _CONFIGS[cfg.stage]
    newest = latest(paths.checkpoints_dir(cfg.stage, cfg.tag))
    stage: BaseConfig | MidConfig = config_class()
    context = None
    origin = "the stage's default settings"
    if newest is not None:
        meta = read_meta(newest)
        stage = from_dict(config_class, meta["run_config"], str(newest))
        context = meta["model_config"]["context_length"]
        origin = f"the settings of {cfg.stage}/{cfg.tag}"
    elif isinstance(stage, BaseConfig):
        context = stage.context_length
    given = {name: value for name, value in vars(cfg.settings).items() if value not in (None, ())}
    given.pop("sequence_length", None)
    if "seed" in given:
        given["run"] = replace(stage.run, seed=given.pop("seed"))
    if isinstance(stage, BaseConfig) and "corpus" in given:
        if len(given["corpus"]) > 1:
            raise UserError(
                f"--stage base takes one --corpus, or several as --mix: {given['corpus']}"
            )
        (given["corpus"],) = given["corpus"]
    for name in given.keys() - vars(stage).keys():
        raise UserError(f"--{name.replace('_', '-')} {given[name]} means nothing to --stage base")
    return replace(stage, **given), context, origin


def choose_sources(
    cfg: Config, stage: BaseConfig | MidConfig, tokenizer: Tokenizer, sequence_length: int
) -> list[Source]:
    """Sources of the stage, or the one store, task or file of pairs that the flags name."""
    if sum(one is not None for one in (cfg.store, cfg.task, cfg.pairs)) > 1:
        raise UserError("--store, --task and --pairs exclude each other; give one of them")
    prompt_weight = 1.0 if isinstance(stage, BaseConfig) else stage.prompt_weight
    if cfg.store is not None:
        store = TokenStore.open(cfg.store, tokenizer.hash)
        return [Source(store, prompt_weight=prompt_weight)]
    if cfg.pairs is not None:
        store = pairs_store(
            cfg.pairs.expanduser(),
            tokenizer,
            sequence_length + 1,
            system="tokens" if isinstance(stage, BaseConfig) else stage.system,
            bad_rows="error" if isinstance(stage, BaseConfig) else stage.bad_rows,
        )
        return [Source(store, prompt_weight=0.0, name=cfg.pairs.name)]
    if isinstance(stage, BaseConfig):
        if cfg.task is not None:
            raise UserError(f"--stage base reads text; show {cfg.task} with --stage mid or sft")
        return pretraining_sources(stage, tokenizer, cfg.split)
    if cfg.task is not None:
        task = registry.build(cfg.task, cfg.split, **registry.corpus_options([cfg.task], tokenizer))
        store = conversations_store(task, tokenizer, system=stage.system, bad_rows=stage.bad_rows)
        store, note = fit_conversations(store, sequence_length, stage.long_conversations)
        return [Source(store, prompt_weight=prompt_weight, name=task.name, note=note)]
    return build_sources(stage, tokenizer, sequence_length, cfg.split)


def main(cfg: Config, runtime: Runtime) -> View | None:
    """Returns the view that was shown (None on ranks other than 0)."""
    if not runtime.is_main:
        return None
    if cfg.rows < 1 or cfg.skip < 0:
        raise UserError(f"--rows {cfg.rows} must be at least 1 and --skip {cfg.skip} at least 0")
    tokenizer = Tokenizer.named(cfg.tokenizer)
    stage, context, origin = stage_settings(cfg)
    sequence_length = cfg.settings.sequence_length or context or BaseConfig().context_length
    sources = choose_sources(cfg, stage, tokenizer, sequence_length)
    for note in (source.note for source in sources if source.note):
        runtime.print(note)

    def make_loader(rows: int) -> DataLoader:
        return DataLoader(
            sources,
            batch_size=rows,
            sequence_length=sequence_length,
            seed=stage.run.seed,
            window=stage.batching.window,
            with_roles=True,
        )

    loader = make_loader(cfg.rows)
    if cfg.skip:
        skipping = make_loader(1)
        for _ in range(cfg.skip):
            next(skipping)
        loader.load_state_dict(skipping.state_dict())
    what = f"{cfg.stage}, {cfg.task or cfg.store or cfg.pairs or cfg.split}"
    settings = f"Made with {origin}; seed {stage.run.seed}, row {cfg.skip} of the epoch and on."
    view = build_view(loader, tokenizer, f"What the model sees: {what}", settings, cfg.skip)
    if cfg.html is not None:
        paths.atomic_write(cfg.html, render_html(view))
        runtime.print(f"wrote {cfg.html}")
    else:
        print_view(view, runtime.console)
    return view


if __name__ == "__main__":
    launch(main, Config, __doc__)
