"""Longer contexts: the extension, the data for it, short rows first, and what measures them."""

import functools
import json
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stores import make_store, numbered_store
from tiny_models import tiny_model, tiny_tokenizer

from nanochat import runtime
from nanochat.attention import Layout
from nanochat.checkpoint_manager import latest, load_model, read_meta
from nanochat.config import BaseConfig, Batching, Duration, Learning
from nanochat.data import store as store_module
from nanochat.data.loader import DataLoader
from nanochat.data.sources import Source
from nanochat.data.store import LongDocuments
from nanochat.errors import UserError
from nanochat.eval.losses import losses_by_position
from nanochat.eval.record import read_measurements
from nanochat.gpt import GPT, GPTConfig, config_from_depth, extend_context
from nanochat.hardware import Machine
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.kv_cache import KVCache
from nanochat.plan import Phase, Plan, context_schedule, make_plan
from nanochat.report import sections
from nanochat.rope import inverse_frequencies
from nanochat.tokenizer import Tokenizer
from scripts import long_eval, tok_encode
from tasks.common import split_of
from tasks.passkey import FILLER, LISTENERS, Haystack, Passkey, corpus_sentences
from tasks.registry import build
from tasks.sources import build_sources, task_sources

CONFIG = GPTConfig(vocab_size=64, n_layer=2, windows=(100, 0), context_length=256)


# The extended configuration


def test_the_same_length_is_the_identity() -> None:
    assert extend_context(CONFIG, 256) is CONFIG
    once = extend_context(CONFIG, 1024)
    assert extend_context(once, 1024) is once


def test_only_the_base_of_full_attention_is_raised() -> None:
    longer = extend_context(CONFIG, 1024)
    assert longer == replace(
        CONFIG,
        context_length=1024,
        rope_base=10000 * 4 ** (128 / 126),
        trained_context_length=256,
        trained_rope_base=10000.0,
    )
    assert (longer.windowed_rope_base, longer.windows) == (10000, (100, 0))
    # The slowest pair turns as far over the new context as it did over the old one.
    slowest = [
        inverse_frequencies(128, c.rope_base)[-1] * c.context_length for c in (CONFIG, longer)
    ]
    torch.testing.assert_close(*slowest)


def test_a_head_of_one_pair_cannot_be_extended_by_its_base() -> None:
    narrow = replace(CONFIG, head_dim=2)
    with pytest.raises(UserError, match=r"head_dim 2.*--rope-scaling none"):
        extend_context(narrow, 1024)
    assert extend_context(narrow, 1024, "none").rope_base == narrow.rope_base


@pytest.mark.parametrize("path", [(512, 2048), (300, 777, 2048), (256, 257, 1024, 2048)])
@pytest.mark.parametrize("first", ["abf", "none"])
def test_extending_in_steps_is_extending_once(path: tuple[int, ...], first: Any) -> None:
    config = extend_context(CONFIG, path[0], first)
    for length in path[1:]:
        config = extend_context(config, length)
    assert config == extend_context(CONFIG, 2048)


def test_the_base_can_be_left_alone() -> None:
    longer = extend_context(CONFIG, 1024, "none")
    assert (longer.rope_base, longer.context_length) == (CONFIG.rope_base, 1024)
    assert longer.trained_context_length == 256


def test_a_context_cannot_shrink() -> None:
    with pytest.raises(UserError, match="--context-length 255 is shorter than the model's 256"):
        extend_context(CONFIG, 255)


def test_cached_decoding_beyond_the_first_context_is_full_recomputation() -> None:
    model = tiny_model(context_length=32, windows=(8, 0, 5))
    ids = torch.randint(0, 300, (2, 80), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"80 tokens .* length 32; .* mid_train --context-length"):
        model(ids)
    short = model(ids[:, :32])
    model.config = extend_context(model.config, 96)
    whole = model(ids)
    cache = model.new_cache(2, 96)
    pieces = [model(ids[:, :50], cache=cache)]
    pieces += [model(ids[:, t : t + 1], cache=cache) for t in range(50, 80)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[:, :32], short, atol=1e-3), "the base counts at once"
    engine = Engine(model, tiny_tokenizer(), tools=False)
    [[completion]] = engine.generate([ids[0].tolist()], SamplingParams(temperature=0, max_tokens=5))
    assert completion.ids[0] == whole[0, -1].argmax()
    assert len(completion.ids) + 80 <= 96


def test_windowed_layers_see_no_farther_and_turn_as_before() -> None:
    """Nothing changes for a model all of whose layers have windows."""
    model = tiny_model(context_length=32, windows=(8, 6, 5))
    ids = torch.randint(0, 300, (1, 96), generator=torch.Generator().manual_seed(0))
    before = model(ids[:, :32])
    model.config = extend_context(model.config, 96)
    after = model(ids)
    torch.testing.assert_close(after[:, :32], before)
    # 8 + 6 + 5 - 3 tokens back reach the output at most, and one more by the token shift.
    other = ids.clone()
    other[0, :40] = (other[0, :40] + 1) % 300
    torch.testing.assert_close(model(other)[:, 40 + 17 :], after[:, 40 + 17 :])


# Documents that are long enough


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(store_module, "_OFFSETS_BLOCK", block)
    lengths = [5, 12, 3, 11, 12, 1, 30]
    documents = [range(100 * i, 100 * i + n) for i, n in enumerate(lengths)]
    store = make_store(tmp_path / "s", documents, [[i % 2] * n for i, n in enumerate(lengths)])
    long = LongDocuments(store, 12)
    assert (len(long), long.num_tokens, long.longest) == (3, 54, 30)
    assert long.lengths(np.arange(3)).tolist() == [12, 12, 30]
    assert [long.ids(i)[0] for i in range(3)] == [100, 400, 600]
    assert long.ids(2, 3, 6).tolist() == [603, 604, 605]
    assert long.ids(1, 10).tolist() == [410, 411]
    mask = long.mask(0)
    assert mask is not None
    assert mask.tolist() == [1] * 12
    with pytest.raises(IndexError, match="document 3 of 3 in s from 12 tokens"):
        long.ids(3)
    assert len(store) == 7, "the store itself is as it was"
    none = LongDocuments(store, 31)
    assert (len(none), none.num_tokens, none.longest) == (0, 0, 30)


def test_a_loader_reads_the_long_documents_only(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [5, 40, 7, 33, 21])
    loader = DataLoader(
        [Source(LongDocuments(store, 33))], batch_size=2, sequence_length=16, epochs=1
    )
    seen = Counter(t for b in loader for t in b.targets[b.targets >= 0].tolist())
    assert seen == dict.fromkeys([*range(7, 46), *range(54, 86)], 1)


# Rows of another length: law 6 over the changes


switching_case = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 90), min_size=1, max_size=30).filter(
            lambda lengths: max(lengths) > 1
        ),
        "phases": st.lists(
            st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(0, 6)), min_size=1
        ),
        "world_size": st.integers(1, 3),
        "window": st.integers(1, 40),
        "seed": st.integers(0, 2**40),
    }
)


@given(switching_case)
@settings(max_examples=60, deadline=None, database=None)
def test_an_epoch_is_exact_whatever_the_lengths_of_its_rows(case: dict[str, Any]) -> None:
    """(row length, batch size, micro-batches) one after the other; all ranks; two epochs."""
    lengths, phases = case["lengths"], case["phases"]
    W = case["world_size"]
    with tempfile.TemporaryDirectory() as folder:
        source = Source(numbered_store(Path(folder) / "s", lengths))
        loaders = [
            DataLoader(
                [source], batch_size=1, sequence_length=50, window=case["window"], rank=rank,
                world_size=W, seed=case["seed"], epochs=2,
            )
            for rank in range(W)
        ]  # fmt: skip
        seen: Counter[int] = Counter()
        for T, rows, count in [*phases, (phases[0][0], 2, 10**6)]:
            for loader in loaders:
                loader.set_rows(T, rows)
            for _ in range(count):
                if loaders[0].finished:
                    break
                for loader in loaders:
                    batch = next(loader)
                    assert batch.inputs.shape == (rows, T)
                    valid = batch.targets >= 0
                    assert (batch.targets[valid] == batch.inputs[valid] + 1).all()
                    seen.update(batch.targets[valid].tolist())
        starts = 1 + np.cumsum([0, *lengths])[:-1]
        expected = set(range(1, 1 + sum(lengths))) - set(starts.tolist())
        assert seen == dict.fromkeys(expected, 2)
        read = next(iter(loaders[0].consumed.values()))
        assert read["tokens"] == 2 * len(expected)
        assert read["documents"] == 2 * sum(n > 1 for n in lengths)


def test_what_is_left_of_a_document_is_joined_and_cut_anew(tmp_path: Path) -> None:
    source = Source(numbered_store(tmp_path / "s", [101]))
    loader = DataLoader([source], batch_size=1, sequence_length=10, epochs=1)
    [[[_, _, start, stop]]] = loader.peek()
    next(loader)
    loader.set_rows(100, 1)
    [pieces] = loader.peek()
    around = [(0, start + 1), (stop - 1, 101)]
    assert sorted((p[2], p[3]) for p in pieces) == [(a, b) for a, b in around if b - a > 1]
    loader.set_rows(40, 1)
    [pieces] = loader.peek()
    assert max(stop - start for _, _, start, stop in pieces) <= 41


@pytest.mark.parametrize("read", [0, 1, 3, 9])
def test_a_position_behind_a_change_is_a_few_integers(tmp_path: Path, read: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 60).tolist()
    source = Source(numbered_store(tmp_path / "s", lengths))

    def make() -> DataLoader:
        return DataLoader([source], batch_size=2, sequence_length=32, window=30, seed=5)

    loader = make()
    for T, count in ((8, 5), (16, 2), (32, read)):
        loader.set_rows(T, 64 // T)
        for _ in range(count):
            next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    assert len(json.dumps(state)) < 500
    other = make()
    other.load_state_dict(state)
    for _ in range(12):
        ours, theirs = next(loader), next(other)
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
    assert other.state_dict() == loader.state_dict()


def test_a_loader_that_never_changes_reads_as_before(tmp_path: Path) -> None:
    source = Source(numbered_store(tmp_path / "s", list(range(1, 60))))
    plain = DataLoader([source], batch_size=2, sequence_length=16, window=10)
    there_and_back = DataLoader([source], batch_size=2, sequence_length=16, window=10)
    there_and_back.set_rows(8, 4)
    there_and_back.set_rows(16, 2)
    for _ in range(30):
        assert torch.equal(next(plain).inputs, next(there_and_back).inputs)
    # A state from before rows could change has no "cuts".
    state = {key: value for key, value in plain.state_dict().items() if key != "cuts"}
    there_and_back.load_state_dict(state)
    assert torch.equal(next(plain).inputs, next(there_and_back).inputs)


# Short rows first


def schedule(text: str | None) -> list[tuple[int, Fraction]]:
    return context_schedule(BaseConfig(context_schedule=text, context_length=99))


def test_a_schedule_is_read() -> None:
    assert schedule(None) == [(99, 1)]
    assert schedule("256:0.5,512:0.5") == [(256, Fraction(1, 2)), (512, Fraction(1, 2))]
    assert schedule("64:0.7,128:0.2,512:0.1")[1] == (128, Fraction(1, 5))
    assert schedule("64:1/3,128:2/3")[0][1] == Fraction(1, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("256:0.5,512:0.4", "add up to 0.9"),
        ("512:0.5,256:0.5", "must rise"),
        ("256:0.5,256:0.5", "must rise"),
        ("200:0.5,256:0.5", "must divide the last one, 256"),
        ("256:0.5,512", "'512': write a length and its share"),
        ("256:0.5,512:x", "'512:x': write"),
        ("0:0.5,512:0.5", "'0:0.5': write"),
        ("256:1.5,512:-0.5", "'512:-0.5': write"),
        ("256:1/0", "'256:1/0': write"),
        ("", "'': write"),
    ],
)
def test_an_impossible_schedule_is_a_user_error(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(text)


def make(text: str, **duration: Any) -> Plan:
    stages = schedule(text)
    config = config_from_depth(2, 300, aspect_ratio=16, head_dim=16, context_length=stages[-1][0])
    return make_plan(
        config,
        batching=Batching(total_batch_size=2048),
        duration=Duration(**duration),
        learning=Learning(),
        machine=Machine("cpu", torch.float32, 2),
        rows_in_epochs=lambda epochs: 100 * epochs,
        schedule=stages,
    )


def test_a_step_has_the_same_tokens_at_every_length() -> None:
    plan = make("64:0.7,128:0.2,512:0.1", num_steps=10)
    assert [(p.first_step, p.sequence_length) for p in plan.phases] == [(0, 64), (7, 128), (9, 512)]
    for phase in plan.phases:
        tokens = phase.sequence_length * phase.device_batch_size * plan.micro_batches * 2
        assert tokens == plan.total_batch_size == 2048
    lengths = [plan.phase(step).sequence_length for step in range(10)]
    assert lengths == [64] * 7 + [128] * 2 + [512]
    alone = {T: make(f"{T}:1", num_steps=10) for T in (64, 128, 512)}
    assert alone[64].phases == ()
    assert alone[64].phase(3) == Phase(0, 64, alone[64].device_batch_size)
    # Longer rows take more FLOPs, in proportion to the share of each (up to windows, see below).
    model = GPT(config_from_depth(2, 300, aspect_ratio=16, head_dim=16, context_length=512))
    mean = sum(s * model.flops_per_token(T) for T, s in schedule("64:0.7,128:0.2,512:0.1"))
    assert plan.flops == pytest.approx(float(mean) * plan.tokens)
    assert "64 tokens from step 0" in plan.describe()
    assert "512 tokens from step 9" in plan.describe()
    with pytest.raises(UserError, match="--epochs 1 with a --context-schedule"):
        make("64:0.5,128:0.5", epochs=1)


def scheduled(text: str, **changes: Any) -> BaseConfig:
    config = tiny_runs.base_config(
        text, context_schedule="16:0.5,64:0.5", batching={"device_batch_size": 4}, **changes
    )
    return tiny_runs.changed(config, saving={"save_every": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scheduled run over documents of about 50 to 700 tokens, in every sixth of them longer."""
    folder = tmp_path_factory.mktemp("schedule") / "whole"
    (folder / "text").mkdir(parents=True)
    texts = tiny_runs.documents(180)
    texts = [" ".join(texts[i : i + 1 + 5 * (i % 6 == 0)]) for i in range(174)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text" / "text.jsonl").write_text(lines)
    with tiny_runs.base_dir(folder):
        Tokenizer.train(texts, 320).save()
        tok_encode.main(tok_encode.Config(str(folder / "text"), workers=1), runtime.single())
    tiny_runs.train("base", folder, scheduled(str(folder / "text")))
    return folder


def test_a_scheduled_run_has_one_context_and_two_row_lengths(whole: Path) -> None:
    lines = (whole / "runs" / "base-default" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    start = records[0]
    assert start["model"]["context_length"] == 64
    assert [p["sequence_length"] for p in start["plan"]["phases"]] == [16, 64]
    assert [p["device_batch_size"] for p in start["plan"]["phases"]] == [16, 4]
    tokens = [r["tokens"] for r in records if r["kind"] == "train"]
    assert tokens == [512 * step for step in range(1, 9)]
    for step, length in ((4, 16), (5, 64), (8, 64)):
        meta = read_meta(whole / "checkpoints" / "base" / "default" / f"step_{step:06d}")
        assert meta["loader_state"]["sequence_length"] == length


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
def test_a_scheduled_run_resumes_exactly(whole: Path, tmp_path: Path, step: int) -> None:
    """Before, at and behind the change of length."""
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    for later in range(step + 1, 9):
        shutil.rmtree(folder / "checkpoints" / "base" / "default" / f"step_{later:06d}")
    config = scheduled(str(whole / "text"), run={"resume": True})
    stage = tiny_runs.train("base", folder, config)
    assert stage.state.step == 8
    assert tiny_runs.losses(folder, "base") == tiny_runs.losses(whole, "base")
    ends = [latest(f / "checkpoints" / "base" / "default") for f in (folder, whole)]
    ours, theirs = (load_file(end / "model.safetensors") for end in ends if end)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (read_meta(end)["loader_state"] for end in ends if end)
    assert ours == theirs


def test_another_schedule_is_no_resumption(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(whole, folder)
    for later in range(4, 9):
        shutil.rmtree(folder / "checkpoints" / "base" / "default" / f"step_{later:06d}")
    config = scheduled(str(whole / "text"), run={"resume": True})
    config = tiny_runs.changed(config, context_schedule="32:0.5,64:0.5")
    with pytest.raises(UserError, match=r"sequence_length = 16, this run has 32"):
        tiny_runs.train("base", folder, config)


def test_each_length_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model = tiny_model(n_layer=1, windows=())
    model.compile_loss()
    lengths = [8, 12, 16, 24, 32, 40, 48, 56, 64, 72]  # more than torch allows by default
    for _ in range(2):
        for T in lengths:
            ids = torch.randint(0, 300, (2, T))
            doc_ids = (torch.arange(T) >= T // 2).int().expand(2, T)
            model.nll(ids, ids.roll(-1, 1), doc_ids)
    assert counter.frame_count == 2 * len(lengths)  # the model, and what is done to its logits
    torch._dynamo.reset()


# Mid-training with a longer context


@pytest.fixture(scope="module")
def extended(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mid-trained model of context 160, made from one of 64."""
    folder = tmp_path_factory.mktemp("extended") / "base"
    shutil.copytree(whole, folder)
    tiny_runs.train("mid", folder, mid_config(whole))
    return folder


def mid_config(whole: Path, **changes: Any) -> Any:
    config = tiny_runs.mid_config(
        str(whole / "text"),
        context_length=160,
        replay=0.2,
        batching={"total_batch_size": 640, "device_batch_size": 4},
    )
    return tiny_runs.changed(config, **changes)


def test_mid_training_extends_the_model(extended: Path, whole: Path) -> None:
    folder = latest(extended / "checkpoints" / "mid" / "default")
    assert folder is not None
    config = read_meta(folder)["model_config"]
    base = latest(whole / "checkpoints" / "base" / "default")
    assert base is not None
    before = read_meta(base)["model_config"]
    assert (config["context_length"], config["trained_context_length"]) == (160, 64)
    assert config["rope_base"] == pytest.approx(10000 * 2.5 ** (16 / 14))
    assert config["trained_rope_base"] == 10000
    assert config["windows"] == before["windows"] == [32, 0]
    assert config["windowed_rope_base"] == 10000


def test_later_stages_keep_the_longer_context(extended: Path, whole: Path) -> None:
    folder = extended.with_name("sft")
    shutil.copytree(extended, folder)
    text = mid_config(whole).corpus[0]
    config = tiny_runs.sft_config(
        text, batching={"total_batch_size": 640, "device_batch_size": 4}, duration={"num_steps": 2}
    )
    stage = tiny_runs.train("sft", folder, config)
    assert stage.plan.sequence_length == 160
    with tiny_runs.base_dir(folder):
        model, tokenizer, meta = load_model("sft", runtime.single())
    assert meta["model_config"]["trained_context_length"] == 64
    assert Engine(model, tokenizer).context_length == 160
    model.nll(torch.zeros(1, 160, dtype=torch.int64), torch.zeros(1, 160, dtype=torch.int64))


def test_an_extended_run_resumes_only_as_such(extended: Path, whole: Path) -> None:
    folder = extended.with_name("resumed")
    shutil.copytree(extended, folder)
    for later in (4, 6):
        shutil.rmtree(folder / "checkpoints" / "mid" / "default" / f"step_{later:06d}")
    forgot = mid_config(whole, run={"resume": True}, context_length=None)
    with pytest.raises(UserError, match=r"data position is for sources"):
        tiny_runs.train("mid", folder, forgot)
    other = tiny_runs.changed(forgot, context_length=128)
    with pytest.raises(UserError, match=r"has a context of 160 tokens, --context-length is 128"):
        tiny_runs.train("mid", folder, other)
    tiny_runs.train("mid", folder, mid_config(whole, run={"resume": True}))
    assert tiny_runs.losses(folder, "mid") == tiny_runs.losses(extended, "mid")


def test_long_documents_have_their_share(whole: Path) -> None:
    config = mid_config(whole, long_fraction=0.34)
    with tiny_runs.base_dir(whole):
        sources = build_sources(config, Tokenizer.load(), 256)
        amounts = [Fraction(str(s.weight)) * s.store.num_targets for s in sources]
        long = sources[-1].store
        assert isinstance(long, LongDocuments)
        assert long.lengths(np.arange(len(long))).min() >= 160
        assert amounts[-1] / sum(amounts) == Fraction("0.34")
        assert amounts[-2] / sum(amounts) == Fraction("0.2")
        plain = build_sources(tiny_runs.changed(config, context_length=None), Tokenizer.load(), 256)
        assert len(plain) == len(sources) - 1, "without an extension all documents are long enough"
        without = build_sources(tiny_runs.changed(config, long_fraction=0.0), Tokenizer.load(), 256)
        assert [s.store.folder for s in without] == [s.store.folder for s in plain]
        longest = LongDocuments(sources[-2].store, 0).longest
        with pytest.raises(UserError, match=f"has 5000 tokens, the longest has {longest}; choose"):
            build_sources(tiny_runs.changed(config, context_length=5000), Tokenizer.load(), 256)
        with pytest.raises(UserError, match=r"--long-fraction 0.8 .* below 1 together with"):
            build_sources(tiny_runs.changed(config, long_fraction=0.8), Tokenizer.load(), 256)


def test_passkeys_of_a_mixture_fit_the_context(whole: Path) -> None:
    config = mid_config(whole, mix=("passkey:20:needles=1:distractors=0",), context_length=200,
                        long_fraction=0.0)  # fmt: skip
    with tiny_runs.base_dir(whole):
        [source] = task_sources(config, Tokenizer.load(), 256)
        lengths = source.store.lengths(np.arange(20))
    assert 100 < lengths.max() <= 200


# Hidden words


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(FILLER, tiny_tokenizer())


def test_a_hidden_word_is_where_it_should_be(haystack: Haystack) -> None:
    for depth in (0.0, 0.3, 0.5, 0.8, 1.0):
        for seed in range(5):
            row = haystack.conversation(Random(seed), 900, [depth])
            question, answer = (message["content"] for message in row["messages"])
            assert 900 - max(haystack.sizes) - 5 <= haystack.size(row) <= 900
            text, _, asked = question.partition("\n\n")
            assert asked.startswith("What do you say to the ")
            assert answer.endswith(f" {row['answer']}.")
            before, needle, after = text.partition(answer)
            assert needle
            sizes = [len(tiny_tokenizer().encode(part)) for part in (before, after)]
            assert sizes[0] / sum(sizes) == pytest.approx(
                depth, abs=0.5 * max(haystack.sizes) / 700
            )


def test_several_words_and_distractors(haystack: Haystack) -> None:
    row = haystack.conversation(Random(1), 1500, [0.1, 0.9, 0.5], distractors=4)
    users = [m["content"] for m in row["messages"] if m["role"] == "user"]
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    assert len(users) == len(answers) == 3
    text = users[0]
    assert sum(text.count(f"Say to the {listener} ") for listener in LISTENERS) == 7
    assert all(answer in text for answer in answers)
    assert len(set(answers)) == 3
    for user, answer in zip(users, answers, strict=True):
        listener = user.removesuffix("?").rpartition("say to the ")[2]
        assert f"Say to the {listener} " in answer
    assert row["answer"] in answers[-1]


def test_words_of_a_split_are_its_own(haystack: Haystack) -> None:
    asked = {
        split: {Passkey(split, 60, 400)[i]["answer"] for i in range(60)}
        for split in ("train", "val", "test")
    }
    for split, words in asked.items():
        assert {split_of(word) for word in words} == {split}
    assert Passkey("train", 9)[3] == Passkey("train", 9)[3] != Passkey("train", 9, seed=1)[3]


def test_rows_are_spread_over_lengths_and_most_training_rows_are_short() -> None:
    def sizes(split: str) -> list[int]:
        task = Passkey(split, 200, 1600, tokenizer=tiny_tokenizer())
        return [task.haystack.size(row) for row in task]

    test, train = sizes("test"), sizes("train")
    shorter = [sum(size <= limit for size in test) for limit in (400, 800, 1600)]
    assert 0 < shorter[0] < shorter[1] < 160 < shorter[2] == 200
    least = Haystack(FILLER, tiny_tokenizer()).least(4, 0)
    assert 130 <= sum(size <= least for size in train) <= 170
    assert 1200 < max(train) <= 1600
    task = Passkey("train", 200, 1600)
    assert {len(row["messages"]) // 2 for row in task} == set(range(1, 9))
    for short in ("0", 1):
        rows = [task.haystack.size(row) for row in Passkey("train", 50, 1600, short=short)]
        assert (max(rows) > 200) == (short == "0")
    assert (
        task.fingerprint() != Passkey("train", 200, 1600, tokenizer=tiny_tokenizer()).fingerprint()
    )


def test_answers_are_judged() -> None:
    task = Passkey("test", 1)
    row = {"answer": "silver lion"}
    right = ("Say to the boy silver lion.", "silver lion", " silver lion. ")
    wrong = ("Say to the boy silver lions.", "quicksilver lion", "white lion", "",
             "Say to the boy white ring. Say to the boy silver lion.")  # fmt: skip
    assert [task.evaluate(row, text) for text in right] == [True] * 3
    assert [task.evaluate(row, text) for text in wrong] == [False] * 5
    assert task.reward(row, right[0]) == 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("passkey:length=20", "length 20 is too short for 8 needles and 2 distractors"),
        ("passkey:needles=0", "must be a needle"),
        ("passkey:needles=19", "at most 20 of both"),
        ("passkey:depth=1.5", "depth '1.5' is not a number from 0 to 1"),
        ("passkey:depth=deep", "depth 'deep' is not a number"),
        ("passkey:short=2", "short 2 is not a number from 0 to 1"),
    ],
)
def test_impossible_settings_are_user_errors(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(spec, "train")


def test_sentences_of_a_corpus(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = [
        "The king went. And he\ncame back? Yes!",
        "One. " + "word " * 99 + "end.",
        "東京。海。",
    ]
    store = make_store(tmp_path / "s", [[tokenizer.bos, *tokenizer.encode(text)] for text in texts])
    assert corpus_sentences(store, tokenizer) == [
        "The king went.", "And he came back?", "Yes!", "One.", "東京。", "海。",
    ]  # fmt: skip


# What measures


class Reader(GPT):
    """Reads the question and copies the answer from the last `sight` tokens of the text."""

    sight = 10**9

    def follow(self, ids: list[int]) -> int:
        tokenizer = tiny_tokenizer()
        start = tokenizer.special("<|assistant_start|>")
        if start not in ids:
            return 0
        begin = len(ids) - ids[::-1].index(start)
        text = tokenizer.decode(ids[max(0, begin - self.sight) : begin])
        listener = re.findall(r"say to the (\w+)\?", text)[-1]
        told = re.findall(rf"Say to the {listener} \w+ \w+\.", text)
        answer = tokenizer.encode(told[0] if told else "I do not know.")
        answer.append(tokenizer.special("<|assistant_end|>"))
        return answer[min(len(ids) - begin, len(answer) - 1)]

    def hidden(self, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(B, T, 1): the next token itself, in the answer."""
        rows = [[self.follow(row[: t + 1]) for t in range(len(row))] for row in ids.tolist()]
        return torch.tensor(rows)[..., None]

    def _cached_hidden(
        self, ids: torch.Tensor, cache: KVCache, counts: torch.Tensor | None
    ) -> torch.Tensor:
        # The cache keeps the ids where keys would be, so they go wherever the engine copies them.
        T = ids.shape[1]
        used = [T] * len(ids) if counts is None else counts.tolist()
        followed = torch.zeros(len(ids), T, 1, dtype=torch.int64)
        for b, start in enumerate(cache.lengths.tolist()):
            cache.keys[0][b, 0, start : start + used[b], 0] = ids[b, : used[b]].float()
            history = cache.keys[0][b, 0, : start + used[b], 0].int().tolist()
            followed[b, used[b] - 1] = self.follow(history)
        cache.advance(ids, counts)
        return followed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0], self.config.vocab_size).float()


def grid(sight: int, **changes: Any) -> dict[str, Any]:
    model = tiny_model(kind=Reader, n_layer=1, windows=(), context_length=640)
    assert isinstance(model, Reader)
    model.sight = sight
    settings = {"samples": 2, "depths": (0.0, 1.0), "lengths": (300, 600)}
    cfg = long_eval.Passkeys(**{**settings, **changes})  # type: ignore[arg-type]
    haystack = Haystack(FILLER, tiny_tokenizer())
    return long_eval.passkey_grid(model, tiny_tokenizer(), haystack, 640, cfg, runtime.single())


def test_a_model_that_copies_finds_everything() -> None:
    found = grid(10**9)
    assert found["forced"] == found["generated"] == [[1.0, 1.0], [1.0, 1.0]]
    assert (found["lengths"], found["depths"]) == ([300, 600], [0.0, 1.0])


def test_a_model_that_sees_half_of_the_text_finds_what_is_in_it() -> None:
    found = grid(300, distractors=0)
    # depth 0 at length 600 is out of sight; the end is in sight at any length.
    assert found["forced"] == found["generated"] == [[1.0, 0.0], [1.0, 1.0]]
    with pytest.raises(
        UserError, match=r"--lengths 700 is beyond the context of 640; .* mid_train --context"
    ):
        grid(300, lengths=(700,))


def test_the_word_is_split_off_at_token_boundaries() -> None:
    tokenizer = tiny_tokenizer()
    row = Haystack(FILLER, tokenizer).conversation(Random(0), 300, [0.5])
    before, word = long_eval.split_at_answer(tokenizer, row)
    whole, _ = tokenizer.render_conversation(row)
    assert whole[: len(before) + len(word)] == before + word
    assert tokenizer.decode(word).strip() == row["answer"]
    assert tokenizer.decode(whole[len(before) + len(word) :]) == ".<|assistant_end|>"


class ByContext:
    """A model whose loss is known: as many hundredths as there are tokens before the target."""

    def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (torch.arange(1, inputs.shape[1] + 1) / 100).expand(inputs.shape)


def test_losses_by_position_and_context_gain(tmp_path: Path) -> None:
    store = numbered_store(tmp_path / "s", [65, 40, 131, 64])
    cfg = long_eval.Config(batch_size=2)
    model: Any = ByContext()
    result = losses_by_position(model, store, 64, cfg.eval_tokens, cfg.batch_size, runtime.single())
    assert result["rows"] == 3, "one of the first document, two of the third"
    buckets = result["loss_by_position"]
    assert [(b["from"], b["to"]) for b in buckets] == [
        (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 64),
    ]  # fmt: skip
    assert [b["loss"] for b in buckets] == pytest.approx([0.01, 0.025, 0.055, 0.115, 0.235, 0.48])
    gain = result["context_gain"]
    # A quarter of 64 is 16; targets come two at a time, with 16 and 17 tokens before them.
    assert (gain["last_tokens"], gain["targets"]) == (16, 3 * 32)
    assert gain["loss_last"] == pytest.approx(0.165)
    assert gain["loss_all"] == pytest.approx(sum(range(32, 64)) / 32 / 100)
    assert gain["gain"] == pytest.approx(gain["loss_last"] - gain["loss_all"])
    odd = losses_by_position(
        model,
        numbered_store(tmp_path / "odd", [66]),
        65,
        cfg.eval_tokens,
        cfg.batch_size,
        runtime.single(),
    )
    assert odd["context_gain"]["targets"] == 34, "the last two tokens are targets, too"
    few = losses_by_position(model, store, 64, 1, cfg.batch_size, runtime.single())
    assert few["rows"] == 1
    with pytest.raises(UserError, match="has 201 tokens, the longest has 131; measure up to that"):
        losses_by_position(model, store, 200, cfg.eval_tokens, cfg.batch_size, runtime.single())


def test_ranks_share_the_measurements(tmp_path: Path) -> None:
    """Sums over ranks are what one rank measures."""
    store = numbered_store(tmp_path / "s", [65, 40, 131, 64])
    cfg, sums = long_eval.Config(), []
    model: Any = ByContext()
    for rank in range(2):
        sums.append([])

        def keep(totals: torch.Tensor, rank: int = rank) -> torch.Tensor:
            sums[rank].append(totals)
            return totals

        fake: Any = SimpleNamespace(
            rank=rank, world_size=2, device=torch.device("cpu"), all_reduce_sum=keep
        )
        losses_by_position(model, store, 64, cfg.eval_tokens, cfg.batch_size, fake)
    alone = losses_by_position(model, store, 64, cfg.eval_tokens, cfg.batch_size, runtime.single())
    by_position = sums[0][0] + sums[1][0]
    assert by_position[:, 1].sum() == 3 * 64, "each target on one rank"
    assert (by_position[:, 0] / by_position[:, 1]).tolist() == pytest.approx(
        [bucket["loss"] for bucket in alone["loss_by_position"]]
    )


def test_the_script_measures_beyond_the_context_and_the_report_shows_it(
    extended: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = extended.with_name("measured")
    shutil.copytree(extended, folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    cfg = long_eval.Config(
        passkeys=long_eval.Passkeys(samples=1, lengths=(150,), distractors=0, haystack="filler"),
        source="mid",
        corpus=mid_config(whole).corpus[0],
        split="train",
        eval_tokens=2000,
    )
    mid = long_eval.main(cfg, runtime.single())
    assert list(mid["bpb"]) == ["64", "160"]
    base = long_eval.main(replace(cfg, source="base", context_length=160), runtime.single())
    assert list(base["bpb"]) == ["64", "160"]
    assert (base["model_context_length"], base["rope_base"]) == (64, 10000)
    with pytest.raises(UserError, match="beyond the context of 64"):
        long_eval.main(replace(cfg, source="base"), runtime.single())
    markdown, page = (path.read_text() for path in sections.write_report())
    for text in (markdown, page):
        assert "Long context" in text
        assert f"{mid['bpb']['160']:.4f}" in text
        assert f"{base['bpb']['160']:.4f}" in text
        assert "rotary base" in text
    assert page.count("color-mix(in srgb, var(--c2)") == 2 * 2 * 5
    beside = re.findall(r"<div class=\"beside\">.*", page)
    assert [re.findall("<th>(base/default|mid/default)</th>", row) for row in beside[-2:]] == [
        ["base/default", "mid/default"]
    ] * 2, "forced, then generated"
    # A shorter look is beside it, not in its place.
    long_eval.main(replace(cfg, eval_tokens=1000), runtime.single())
    kept = read_measurements(folder / "report" / "eval_mid-default.json")
    assert [one["settings"]["eval_tokens"] for one in kept] == [2000, 1000]
    assert kept[0]["result"]["bpb"] == mid["bpb"]
    # Files of earlier versions are shown too, and whatever is in them, the rest is.
    path = folder / "report" / "long_eval_mid-default.json"
    path.write_text(json.dumps({**mid, "bpb": {"160": 7.25}}))
    assert "7.2500" in sections.write_report()[1].read_text()
    broken = {"bpb": 3, "passkey": {"forced": [[None, 2]], "depths": ["x"], "lengths": [1]}}
    path.write_text(json.dumps({**broken, "loss_by_position": [3]}))
    assert "Long context" in sections.write_report()[1].read_text()
    path.write_text("[")
    assert "a readable long" in sections.write_report()[0].read_text()
