"""Mixtures of corpora, what is held out, and losses by role."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny_runs
import torch
from stores import numbered_store

from nanochat.config import BaseConfig, MidConfig, SftConfig
from nanochat.data import sources as sources_module
from nanochat.data.conversations import conversations_store
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source, describe_mixture, parse_shares, text_sources
from nanochat.data.store import TokenStore
from nanochat.errors import UserError
from nanochat.eval.losses import evaluate_roles, mixture_bpb
from nanochat.runtime import Runtime, single
from nanochat.tokenizer import ROLE_NAMES, Tokenizer
from scripts import chat_eval, decontaminate, tok_encode
from tasks.common import Conversation, Task
from tasks.customjson import CustomJSON
from tasks.registry import build, build_halves
from tasks.sources import build_held_out, build_sources, task_sources
from tasks.views import TaskRest, TaskSlice, hold_out


def targets(store: TokenStore) -> int:
    return store.num_targets


# Shares


def test_shares_are_read_behind_the_last_colon() -> None:
    parts = ["climbmix:0.9", "org/name:column:1/3", "C:\\books:2", "./a folder:1e-3"]
    assert parse_shares(parts, "--mix") == {
        "climbmix": Fraction(9, 10),
        "org/name:column": Fraction(1, 3),
        "C:\\books": Fraction(2),
        "./a folder": Fraction(1, 1000),
    }


@pytest.mark.parametrize(
    "part",
    [
        "bbe",
        "o/name:text",
        "C:\\a",
        "bbe:",
        ":1",
        "bbe:0",
        "bbe:-1",
        "bbe:1/0",
        "bbe:nan",
        "bbe:inf",
    ],
)
def test_a_share_that_is_none_is_named(part: str) -> None:
    with pytest.raises(UserError) as error:
        parse_shares(["climbmix:0.9", part], "--mix")
    assert f"--mix {part}: write a corpus and its share above 0" in str(error.value)


def test_a_corpus_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--mix names bbe twice"):
        parse_shares(["bbe:0.5", "climbmix:1", "bbe:0.5"], "--mix")
    store = numbered_store(tmp_path / "store", [5, 5])
    monkeypatch.setattr(sources_module, "open_store", lambda *_: store)
    with pytest.raises(UserError, match=r"\./books and books are the same corpus"):
        text_sources(parse_shares(["./books:1", "books:2"], "--mix"), None)  # type: ignore[arg-type]


def test_shares_of_the_targets_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares hold for all sizes, after so many epochs that all have gone through whole passes."""
    stores = {
        "large": numbered_store(tmp_path / "large", [31, 8, 20, 45] * 7),
        "small": numbered_store(tmp_path / "small", [9, 2, 3, 7, 4], vocab_size=2**17),
        "tiny": numbered_store(tmp_path / "tiny", [21]),
    }
    monkeypatch.setattr(sources_module, "open_store", lambda name, *_: stores[name])
    shares = parse_shares(["large:0.7", "small:0.2", "tiny:0.1"], "--mix")
    sources = text_sources(shares, None)  # type: ignore[arg-type]
    weights = [Fraction(str(source.weight)) for source in sources]
    assert max(weights) == 1, "an epoch repeats nothing"
    assert describe_mixture(sources, 2000) == (
        "mixture: large 70.0% (2 passes), small 20.0% (20 passes), tiny 10.0% (10 passes)"
    )
    epochs = math.lcm(*(weight.denominator for weight in weights))
    loader = DataLoader(sources, batch_size=64, sequence_length=31, epochs=epochs)
    for _ in loader:
        pass
    consumed = {name: value["tokens"] for name, value in loader.consumed.items()}
    total = sum(consumed.values())
    assert {name: Fraction(count, total) for name, count in consumed.items()} == shares


def test_a_corpus_without_targets_cannot_have_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {
        "some": numbered_store(tmp_path / "some", [5]),
        "none": numbered_store(tmp_path / "none", [1, 1]),
    }
    monkeypatch.setattr(sources_module, "open_store", lambda name, *_: stores[name])
    with pytest.raises(UserError, match="none has no document of more than one token"):
        text_sources({"some": Fraction(1), "none": Fraction(1)}, None)  # type: ignore[arg-type]


# Runs over a mixture


@pytest.fixture(scope="module")
def two(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A base folder with two encoded corpora, and their names."""
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(encoded, root / "base")
    other = root / "other"
    other.mkdir()
    lines = [json.dumps({"story": text}) for text in tiny_runs.documents(60, seed=5)]
    (other / "b.jsonl").write_text("\n".join(lines))
    name = f"{other}:story"
    with tiny_runs.base_dir(root / "base"):
        tok_encode.main(tok_encode.Config(name, workers=1), single())
    return root / "base", tiny_runs.corpus(encoded), name


def evals(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / "runs" / f"{stage}-default" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["kind"] == "eval"]


def mixed(two: tuple[Path, str, str], folder: Path) -> tuple[Path, BaseConfig]:
    base, first, second = two
    shutil.copytree(base, folder)
    config = tiny_runs.base_config(first, mix=(f"{first}:0.75", f"{second}:0.25"))
    return folder, config


def test_a_run_over_a_mixture_resumes_and_measures_each_corpus(
    two: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, config = mixed(two, tmp_path / "whole")
    tiny_runs.train("base", folder, config)
    whole = tiny_runs.losses(folder, "base")

    end = (folder / "runs" / "base-default" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(end)["consumed"].keys() == {two[1], two[2]}
    record = evals(folder, "base")[-1]
    names = [key for key in record if key.startswith("bpb_")]
    assert len(names) == 2
    assert names[1].endswith("other_story")
    assert min(record[n] for n in names) < record["bpb"] < max(record[n] for n in names)
    assert all(type(record[key]) is float for key in ("bpb", *names))

    folder, config = mixed(two, tmp_path / "halves")
    first_half = tiny_runs.changed(config, saving={"max_hours": 1e-9})  # stops after a step
    tiny_runs.train("base", folder, first_half)
    assert len(tiny_runs.losses(folder, "base")) < len(whole)
    tiny_runs.train("base", folder, tiny_runs.changed(config, run={"resume": True}))
    assert tiny_runs.losses(folder, "base") == whole

    other = tiny_runs.changed(
        config,
        run={"resume": True},
        mix=(config.mix[0], f"{two[2]}:0.5"),
        duration={"num_steps": 9},
    )
    with pytest.raises(UserError, match="resume with the same data settings"):
        tiny_runs.train("base", folder, other)


def test_bpb_of_a_mixture_is_of_its_mixed_text(tmp_path: Path) -> None:
    """Two corpora of equal shares in tokens, whose tokens are of unequal length."""
    stores = [numbered_store(tmp_path / "a", [101]), numbered_store(tmp_path / "b", [11])]
    sources = [Source(stores[0], weight="1/10"), Source(stores[1], weight=1)]
    results = [
        {"bpb": 2.0, "bytes": 300, "tokens": 100},  # 6 bits a token
        {"bpb": 1.0, "bytes": 10, "tokens": 10},  # 1 bit a token
    ]
    assert mixture_bpb(sources, results) == pytest.approx((6 + 1) / (3 + 1))


def test_several_corpora_are_replayed_by_their_shares(two: tuple[Path, str, str]) -> None:
    base, first, second = two
    config = tiny_runs.mid_config(first, corpus=(f"{first}:3", f"{second}:1"), replay=0.2)
    with tiny_runs.base_dir(base):
        sources = build_sources(config, Tokenizer.load(), 256)
    amounts = {s.name: Fraction(str(s.weight)) * targets(s.store) for s in sources}
    total = sum(amounts.values())
    assert amounts[first] / total == Fraction("0.15")
    assert amounts[second] / total == Fraction("0.05")
    with tiny_runs.base_dir(base), pytest.raises(UserError, match="--corpus bbe: write a corpus"):
        build_sources(
            tiny_runs.changed(config, corpus=(f"{first}:3", "bbe")), Tokenizer.load(), 256
        )


# What is held out


@pytest.mark.parametrize("size", [50, 99, 100, 3199, 3200, 3201, 100_003])
def test_each_row_is_trained_on_or_held_out(size: int) -> None:
    task = build(f"arithmetic:{size}", "train")
    train, held_out = hold_out(task)
    assert isinstance(train, TaskRest)
    assert isinstance(held_out, TaskSlice)
    assert len(held_out) == min(64, size // 50)
    kept = [train.locate(i) for i in range(len(train))]
    assert sorted([*kept, *held_out.indices]) == list(range(size))
    assert kept == sorted(kept)
    assert train[len(train) - 1] == task[kept[-1]]
    assert train.where(7) == task.where(kept[7])
    # Spread over the task, which may be sorted by subject.
    gaps = {b - a for a, b in zip(held_out.indices, held_out.indices[1:], strict=False)}
    assert len(gaps) <= 1
    assert held_out.indices[-1] >= size - 2 * size // len(held_out)


def test_the_rest_of_any_slice() -> None:
    task = build("arithmetic:20", "train")
    for rows in ((0, 5, 1), (15, 20, 1), (3, 20, 4), (19, 20, 3), (0, 20, 2), (1, 2, 1)):
        part = TaskSlice(task, *rows)
        rest = TaskRest(part)
        kept = [rest.locate(i) for i in range(len(rest))]
        assert kept == [i for i in range(20) if i not in part.indices]
    with pytest.raises(UserError, match="nothing is left of arithmetic/train"):
        TaskRest(TaskSlice(task))


def test_a_small_task_is_trained_on_whole() -> None:
    task = build("arithmetic:49", "train")
    assert hold_out(task) == (task, None)


def test_halves_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = build_halves("arithmetic:300")
    assert (train.split, len(train)) == ("train", 300)
    assert held_out is not None
    assert (held_out.split, len(held_out)) == ("val", 64)

    train, held_out = build_halves("customjson")
    assert held_out is not None
    assert len(train) + len(held_out) == len(CustomJSON())
    assert len({one.fingerprint() for one in (train, held_out, CustomJSON())}) == 3

    words = tmp_path / "words.txt"
    words.write_text("\n".join(["house", "stone"]))  # neither belongs to val
    train, held_out = build_halves(f"simplespelling:words={words}:100")
    assert held_out is not None
    assert held_out.split == "train"
    assert (len(train), len(held_out)) == (98, 2)


# Losses by role


class Talk(Task):
    """Every role, in conversations of different lengths."""

    def __init__(self) -> None:
        super().__init__("talk", "train")

    def __len__(self) -> int:
        return 7

    def settings(self) -> dict[str, Any]:
        return {}

    def row(self, index: int) -> Conversation:
        said = [
            {"type": "text", "text": "let me see" * index + "."},
            {"type": "python", "text": f"{index}+1"},
            {"type": "python_output", "text": str(index + 1)},
            {"type": "text", "text": "so it is"},
        ]
        return {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{index} and one?"},
                {"role": "assistant", "content": said},
            ]
        }


class ByTarget(torch.nn.Module):
    """A model whose loss on a target is known: its id, in thousandths."""

    def nll(
        self, inputs: torch.Tensor, targets: torch.Tensor, _: torch.Tensor, boundaries: object
    ) -> torch.Tensor:
        return torch.where(targets >= 0, targets / 1000, 0.0)


def test_losses_by_role_are_those_of_the_rendered_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    by_name: dict[str, list[float]] = {}
    for conversation in Talk():
        ids, mask, roles = tokenizer.render_roles(conversation)
        for token, produced, role in list(zip(ids, mask, roles, strict=True))[1:]:
            by_name.setdefault(ROLE_NAMES[role], []).append(token / 1000)
            if produced:
                by_name.setdefault("masked", []).append(token / 1000)
    assert set(by_name) == {*ROLE_NAMES, "masked"}
    store = conversations_store(Talk(), tokenizer)
    loader = DataLoader(
        [Source(store, prompt_weight=0.5)],
        batch_size=2,
        sequence_length=40,  # some are cut
        epochs=1,
        with_roles=True,
    )
    result = evaluate_roles(ByTarget(), loader, single())  # type: ignore[arg-type]
    assert list(result) == [f"loss_{name}" for name in ("masked", *ROLE_NAMES)]
    for name, values in by_name.items():
        assert result[f"loss_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-6), name
    # Of roles that don't occur nothing is said.
    plain = Source(numbered_store(tmp_path / "text", [30], vocab_size=2**16))
    loader = DataLoader([plain], batch_size=2, sequence_length=40, epochs=1, with_roles=True)
    assert evaluate_roles(ByTarget(), loader, single()) == {}  # type: ignore[arg-type]


def test_mid_and_sft_log_the_losses_of_held_out_conversations(
    encoded: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoded, tmp_path / "run")
    text = tiny_runs.corpus(encoded)
    for stage in ("base", "mid", "sft"):
        config = tiny_runs.CONFIGS[stage](text)
        config = tiny_runs.changed(
            config, duration={"num_steps": 2}, evaluating={"eval_tokens": 2**14}
        )
        tiny_runs.train(stage, tmp_path / "run", config)
    roles = {"system", "user", "assistant", "special", "tool_call", "tool_output", "masked"}
    for stage in ("mid", "sft"):
        record = evals(tmp_path / "run", stage)[-1]
        assert {key for key in record if key.startswith("loss_")} == {f"loss_{r}" for r in roles}
        assert all(type(value) is float for key, value in record.items() if "_" in key)
        assert record["bpb"] > 0
    assert not any(key.startswith("loss_") for key in evals(tmp_path / "run", "base")[-1])

    # Nothing that is measured is trained on.
    with tiny_runs.base_dir(tmp_path / "run"):
        config = tiny_runs.mid_config(text)
        tokenizer = Tokenizer.load()
        trained, held_out = (
            {bytes(s.store.ids(i)) for s in sources for i in range(len(s.store))}
            for sources in (
                task_sources(config, tokenizer, 64),
                build_held_out(config, tokenizer, 64).conversations,
            )
        )
    assert len(held_out) > 64
    assert not trained & held_out


@pytest.mark.parametrize("how", ["truncate", "split", "drop"])
def test_long_conversations_are_trained_on_as_asked(encoded: Path, how: str) -> None:
    """Rows of 100 tokens, and conversations of up to 200."""
    with tiny_runs.base_dir(encoded):
        config = tiny_runs.sft_config(tiny_runs.corpus(encoded))
        assert (MidConfig().long_conversations, SftConfig().long_conversations) == (
            "split",
            "truncate",
        )
        config = tiny_runs.changed(config, long_conversations=how)
        sources = task_sources(config, Tokenizer.load(), 100)
        loader = DataLoader(sources, batch_size=1, sequence_length=100, epochs=1)
        starts, whole = set(), 0
        while not loader.finished:
            for source, document, start, stop in loader.peek()[0]:
                starts.add(start)
                whole += start == 0 and stop == len(sources[source].store.ids(document))
            next(loader)
        assert starts == ({0} if how != "split" else starts | {100})
        assert all(source.note.endswith(f"(--long-conversations {how})") for source in sources)
        assert sources[0].note.startswith("arithmetic: ")
        sizes = [len(s.store) for s in task_sources(config, Tokenizer.load(), 1000)]
        assert (sizes == [len(s.store) for s in sources]) == (how != "drop")
    assert whole > 20


# Several ranks


def data_commands(runtime: Runtime, folder: Path, first: str, second: str) -> dict[str, Any]:
    """One rank's share of what reads data: training on mixtures, evaluations, decontamination."""
    mix = (f"{first}:0.75", f"{second}:0.25")
    base = tiny_runs.base_config(first, mix=mix, duration={"num_steps": 4})
    mid = tiny_runs.mid_config(first, corpus=mix, replay=0.3, duration={"num_steps": 2})
    chat = chat_eval.Config(
        answering=chat_eval.Answering(max_tokens=3),
        source="mid",
        task=("arithmetic:9",),
        batch_size=4,
    )
    leaks = decontaminate.Config(
        tasks=decontaminate.Tasks(("arithmetic:9",), ngram=1), corpus=(first,), workers=1
    )
    tiny_runs.train("base", folder, base, runtime)
    tiny_runs.train("mid", folder, mid, runtime)
    with tiny_runs.base_dir(folder):
        measured = chat_eval.main(chat, runtime)
        results = {spec: one["result"] for spec, one in measured.items()}
        reports = decontaminate.main(leaks, runtime).values()
    return {"chat": results, "documents": [report["matches"] for report in reports]}


def test_two_ranks_do_what_one_does(two: tuple[Path, str, str], tmp_path: Path) -> None:
    base, first, second = two
    results = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        shutil.copytree(base, folder)
        results[ranks] = processes.run_ranks(data_commands, ranks, folder, first, second)
    (alone,), (main, other) = results[1], results[2]
    assert main == alone
    assert alone["documents"][0]
    assert other == {"chat": alone["chat"], "documents": []}
    for stage, record in (("base", -1), ("mid", 0)):
        one, both = (tiny_runs.losses(tmp_path / str(ranks), stage) for ranks in (1, 2))
        # Muon turns what rounding left of a gradient into steps of full size.
        assert both == pytest.approx(one, rel=1e-3)
        measured = [
            {key: value for key, value in evaluation.items() if key.startswith(("bpb", "loss"))}
            for evaluation in (evals(tmp_path / str(ranks), stage)[record] for ranks in (1, 2))
        ]
        assert measured[1] == pytest.approx(measured[0], rel=3e-4)
        assert len(measured[0]) >= (3 if stage == "base" else 9)
