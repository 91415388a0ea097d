"""Reinforcement learning end to end: it learns, resumes, and does not depend on the ranks.

The model begins by answering any of four letters. What is rewarded (or preferred) is "b", so the
best policy is known: always "b".
"""

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import processes
import pytest
import test_laws_resume as law4
import tiny_runs
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from nanochat import loss, paths, runtime
from nanochat.checkpoint_manager import latest, list_steps, load_model, read_meta
from nanochat.config import Preferences, RlConfig, RlEvaluating, Rollouts, Run, Saving, to_dict
from nanochat.errors import UserError
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.report.sections import write_report
from nanochat.rl import policy
from nanochat.rl.dpo import pair_scores
from nanochat.rl.rollouts import Group
from nanochat.runtime import Runtime
from nanochat.stage import Stage
from nanochat.train import NonFiniteLoss
from scripts import chat_rl
from tasks import registry
from tasks.common import Conversation, Task

LETTERS = "abcd"
BEST = "b"


class Letters(Task):
    """Any letter is an answer, one is rewarded."""

    VAL_BY_CONTENT = True

    def __init__(self, split: str, kind: str = "plain"):
        super().__init__("letters", split)
        self.kind = kind

    def __len__(self) -> int:
        return 60 if self.split == "train" else 24

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def row(self, index: int) -> Conversation:
        number = index if self.split == "train" else 100 + index
        ask = f"the king saw {number}"
        if self.kind == "long" and self.split == "train" and index % 2:
            ask *= 20
        if self.kind == "endless":
            ask *= 20
        return {
            "messages": [
                {"role": "user", "content": ask},
                {"role": "assistant", "content": BEST},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == BEST

    def reward(self, conversation: Conversation, completion: str) -> float:
        special: dict[str, Any] = {"ones": 1.0, "zeros": 0.0, "bad": math.nan, "text": "good"}
        if self.kind in special:
            return special[self.kind]
        return float(completion == BEST)

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        return completion in LETTERS


class Others(Letters):
    """Another letter is rewarded."""

    def __init__(self, split: str, kind: str = "plain"):
        super().__init__(split, kind)
        self.name = "others"

    def reward(self, conversation: Conversation, completion: str) -> float:
        return float(completion == "c")


class NoRewards(Letters):
    evaluate = Task.evaluate
    reward = Task.reward


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TASKS, "letters", registry.Entry(Letters, "kind"))
    monkeypatch.setitem(registry.TASKS, "others", registry.Entry(Others, "kind"))
    monkeypatch.setitem(registry.TASKS, "norewards", registry.Entry(NoRewards, None))


@pytest.fixture(scope="module")
def start(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with an SFT checkpoint that answers any of the letters; copy it."""
    folder = tmp_path_factory.mktemp("rl") / "start"
    shutil.copytree(encoded, folder)
    random = Random(0)
    lines = []
    for number in range(240):
        answer = {"role": "assistant", "content": random.choice(LETTERS)}
        ask = {"role": "user", "content": f"the king saw {number}"}
        lines.append(json.dumps({"messages": [ask, answer]}))
    path = folder / "letters.jsonl"
    path.write_text("\n".join(lines))
    text = tiny_runs.corpus(encoded)
    tiny_runs.train("base", folder, tiny_runs.base_config(text, duration={"num_steps": 2}))
    tiny_runs.train(
        "sft",
        folder,
        tiny_runs.sft_config(
            text,
            source="base",
            mix=(f"customjson:{path}:1",),
            duration={"num_steps": 80},
            saving={"save_every": 0},
            learning={"lr_scale": 0.5},
        ),
    )
    return folder


@pytest.fixture
def folder(start: Path, tmp_path: Path) -> Path:
    shutil.copytree(start, tmp_path / "run")
    return tmp_path / "run"


def config(**changes: Any) -> RlConfig:
    cfg = RlConfig(
        run=Run(device="cpu", dtype="float32"),
        rollouts=Rollouts(prompts_per_step=4, group_size=8, max_tokens=4),
        evaluating=RlEvaluating(eval_every=0, eval_problems=16),
        saving=Saving(save_every=2, keep_last=0),
        learning=replace(RlConfig().learning, lr_scale=0.2),
        mix=("letters",),
        num_steps=6,
        device_batch_size=2,
    )
    return tiny_runs.changed(cfg, **changes)  # type: ignore[type-var]


def run(folder: Path, cfg: RlConfig, rank: Runtime | None = None) -> Stage:
    with tiny_runs.base_dir(folder):
        return chat_rl.main(cfg, rank or runtime.single())


def records(folder: Path, kind: str, tag: str = "default") -> list[dict[str, Any]]:
    lines = (folder / "runs" / f"rl-{tag}" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(folder: Path, step: int | None = None, tag: str = "default") -> dict[str, torch.Tensor]:
    run_folder = folder / "checkpoints" / "rl" / tag
    chosen = latest(run_folder) if step is None else run_folder / f"step_{step:06d}"
    assert chosen is not None
    return load_file(chosen / "model.safetensors")


# It learns


@pytest.mark.parametrize("updates", [1, 2])
def test_the_rewarded_answer_is_learned_on_held_out_prompts(folder: Path, updates: int) -> None:
    """From about one in four to four in five, with and without importance weights."""
    cfg = config(
        num_steps=24,
        rollouts={"updates_per_rollout": updates, "prompts_per_step": 8, "max_importance": 1.2},
        evaluating={"eval_every": 8, "sample_every": 8},
        learning={"lr_scale": 0.6},
    )
    stage = run(folder, cfg)
    assert stage.finished
    first, *_, last = records(folder, "eval")
    assert 0.1 < first["pass@1"] < 0.5
    assert last["pass@1"] > 0.8
    assert last["pass@1_greedy"] == 1
    assert first["kl_to_start"] == 0
    assert last["kl_to_start"] > 0.1
    for record in (first, last):
        assert record["pass@1"] <= record["pass@2"] <= record["pass@4"] <= 1
        assert record["reward"] == record["pass@1"], "1 for a right answer, else 0"
        assert record["length"] == pytest.approx(2, abs=0.4)
        assert 0 < record["entropy"] < 2
        assert 0 <= record["truncated"] < 0.2
        assert record["tool_calls"] >= 0
    assert [record["step"] for record in records(folder, "eval")] == [0, 8, 16, 24]
    steps = records(folder, "train")
    assert [record["step"] for record in steps] == list(range(1, 25))
    assert ["reward" in record for record in steps] == [not i % updates for i in range(24)]
    for i, record in enumerate(steps):
        assert ("clipped" in record) == (i % updates > 0 and not record.get("skipped"))
    assert any(record.get("clipped", 0) > 0 for record in steps) == (updates > 1)
    samples = records(folder, "sample")
    assert {record["step"] for record in samples} == {0, 8, 16, 24 - updates}
    assert all("reward" in s["text"] and "king saw" in s["prompt"] for s in samples)
    (end,) = records(folder, "end")
    assert end["consumed"]["letters"]["documents"] == 8 * 24 // updates
    with tiny_runs.base_dir(folder):
        model, tokenizer, meta = load_model("rl", runtime.single())
    source = {key: meta["source"][key] for key in ("stage", "tag", "step")}
    assert source == {"stage": "sft", "tag": "default", "step": 80}
    assert meta["run_config"]["system"] == "tokens"
    ask = {"messages": [{"role": "user", "content": "the king saw 7"}]}
    ((answer,),) = Engine(model, tokenizer).generate(
        [tokenizer.render_for_completion(ask)], SamplingParams(temperature=0)
    )
    assert answer.text == BEST


def test_the_denominator_is_every_sampled_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log counts all finished answers, those of groups with nothing to tell included."""
    latest_groups: list[Group] = []
    divisors, expected, targets = [], [], []
    roll_out, train_step = policy.roll_out, policy.train_step

    def spied_roll_out(*arguments: Any) -> list[Group]:
        latest_groups[:] = roll_out(*arguments)
        return latest_groups

    def spied_train_step(*arguments: Any, **keywords: Any) -> Any:
        divisors.append(keywords["divisor"])
        lengths = [
            (sum(completion.mask), any(group.advantages))
            for group in latest_groups
            for completion in group.completions
            if completion.finish_reason == "stop"
        ]
        expected.append(sum(length for length, _ in lengths))
        targets.append(sum(length for length, kept in lengths if kept))
        return train_step(*arguments, **keywords)

    monkeypatch.setattr(policy, "roll_out", spied_roll_out)
    monkeypatch.setattr(policy, "train_step", spied_train_step)
    run(folder, config(num_steps=4, rollouts={"group_size": 3, "max_tokens": 2}))
    assert divisors == expected
    assert any(fewer < all_ for fewer, all_ in zip(targets, expected, strict=True))
    truncated = [record["truncated"] for record in records(folder, "train")]
    assert any(truncated), "what is cut off is not counted"


def test_a_format_bonus_is_logged_apart_from_the_reward(folder: Path) -> None:
    run(folder, config(num_steps=2, rollouts={"format_bonus": 0.25}))
    shown = "".join(sample["text"] for sample in records(folder, "sample"))
    assert re.search(r"\[reward [01], bonus 0.25, advantage", shown)
    for record in records(folder, "train"):
        assert record["bonus"] == pytest.approx(0.25, abs=0.08), "nearly all answers are letters"
        assert record["reward"] < 0.7
    assert "bonus" not in records(folder, "eval")[-1]


def test_a_mixture_is_judged_by_each_of_its_tasks(folder: Path) -> None:
    run(folder, config(mix=("letters", "others:0.5"), num_steps=4))
    last = records(folder, "eval")[-1]
    names = {name for name in last if name.startswith("pass@1_greedy_")}
    assert names == {"pass@1_greedy_letters", "pass@1_greedy_others"}
    assert last["pass@1_greedy"] == pytest.approx(sum(last[name] for name in names) / 2)
    (end,) = records(folder, "end")
    documents = {name: value["documents"] for name, value in end["consumed"].items()}
    assert sum(documents.values()) == 16
    assert documents["letters"] > documents["others"] > 0


def test_compiled_without_a_break(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and run as they are; the answers' lengths differ in every step."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    changes = {"run": {"compile": "on"}, "evaluating": {"eval_every": 2}}
    cfg = config(num_steps=4, rollouts={"updates_per_rollout": 2}, **changes)
    assert run(folder, cfg).finished
    assert not counters["graph_break"], dict(counters["graph_break"])
    # What was drawn is scored, and trained on; what is done to the logits is a graph of its own.
    assert 2 <= counters["stats"]["unique_graphs"] <= 8
    torch._dynamo.reset()
    loss._compiled.cache_clear()


def test_the_report_shows_it(folder: Path) -> None:
    run(folder, config(num_steps=4, evaluating={"eval_every": 2}))
    with tiny_runs.base_dir(folder):
        markdown, page = write_report()
    text, html = markdown.read_text(), page.read_text()
    assert "RL: reinforcement learning" in text
    for title in (
        "held-out problems answered rightly",
        "held-out entropy and KL to the start",
        "reward of rollouts",
        "share of groups with something to tell",
    ):
        assert title in html
    assert "share solved at the first try" in text
    assert "advantage" in text, "rollouts with their rewards"
    assert "rollout seconds" not in html


# Law 4, and law 2 up to the order of sums


def register() -> None:
    registry.TASKS["letters"] = registry.Entry(Letters, "kind")


COMMON = "--device cpu --dtype float32 --mix letters --prompts-per-step 4 --group-size 4 "
COMMON += "--max-tokens 4 --num-steps 6 --save-every 2 --keep-last 0 --eval-every 3 "
COMMON += "--eval-problems 8 --device-batch-size 2 --lr-scale 0.2"
VARIANTS = {
    "reinforce": [],
    "cispo": ["--updates-per-rollout", "2"],
    "dpo": ["--algo", "dpo", "--beta", "0.5"],
}


def prefer(folder: Path, count: int = 60) -> Path:
    """Pairs in which "b" is always preferred."""
    random = Random(1)
    lines = []
    for number in range(count):
        ask = {"role": "user", "content": f"the king saw {number}"}
        worse = random.choice("acd")
        lines.append(json.dumps({"messages": [ask], "chosen": BEST, "rejected": worse}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def command(variant: str, folder: Path, *more: str) -> list[str]:
    pairs = ["--pairs", str(prefer(folder))] if variant == "dpo" else []
    return [*COMMON.split(), *VARIANTS[variant], *pairs, *more]


def script(folder: Path, argv: list[str], prepare: Callable[[], None] | None = None) -> None:
    def both() -> None:
        register()
        if prepare is not None:
            prepare()

    law4.MODULES["rl"] = "chat_rl"
    law4.script("rl", folder, argv, both)


def script_and_die(folder: Path, argv: list[str], moment: str) -> None:
    owner, name, call, half = law4.MOMENTS[moment][:4]
    script(folder, argv, lambda: law4.kill_at(owner, name, call, half))


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request: pytest.FixtureRequest, start: Path) -> tuple[str, Path]:
    """A variant, and where it ran without interruption."""
    folder = start.parent / f"whole {request.param}"
    shutil.copytree(start, folder)
    process = processes.start(script, folder, command(request.param, folder))
    assert processes.finish(process) == 0
    return request.param, folder


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["after a step", "while weights are written"])
def test_killed_and_resumed_is_uninterrupted(
    moment: str, whole: tuple[str, Path], start: Path, tmp_path: Path
) -> None:
    variant, folder = whole
    expected = law4.outcome("rl", folder)
    assert len(set(expected["losses"].values())) > 3, "something was learned from"
    folder = tmp_path / "killed"
    shutil.copytree(start, folder)
    argv = command(variant, folder)
    killed = processes.start(script_and_die, folder, argv, moment)
    assert processes.finish(killed) == -signal.SIGKILL
    assert list_steps(folder / "checkpoints" / "rl" / "default") < [2, 4, 6]
    assert processes.finish(processes.start(script, folder, [*argv, "--resume"])) == 0
    law4.assert_same(law4.outcome("rl", folder), expected)


def run_rank(rank: Runtime, folder: Path, cfg: RlConfig) -> None:
    register()
    with tiny_runs.base_dir(folder):
        chat_rl.main(cfg, rank)


def open_in_turn(rank: Runtime, folder: Path, cfg: RlConfig) -> list[bool]:
    """Open the tasks on one rank; returns, for each time, whether the data was there already."""
    marker, found = folder / "prepared", []
    build_mixture = chat_rl.build_mixture

    class Opened(Exception):
        pass

    def prepare(*arguments: Any, **keywords: Any) -> Any:
        found.append(marker.exists())
        time.sleep(0.2)  # ranks that do not wait look for it in this time
        marker.touch()
        return build_mixture(*arguments, **keywords)

    def stop(*_: Any) -> None:
        raise Opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rl, "build_mixture", prepare)
        patch.setattr(chat_rl, "PolicyGradient", stop)
        with pytest.raises(Opened):
            run_rank(rank, folder, cfg)
    return found


def test_data_sets_are_prepared_by_one_rank_first(folder: Path) -> None:
    assert processes.run_ranks(open_in_turn, 3, folder, config()) == [[False], [True], [True]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_ranks_changes_nothing(variant: str, start: Path, tmp_path: Path) -> None:
    """1, 2 and 3 ranks for 4 prompts; and 3 ranks that go on from where 2 were."""
    base = config(num_steps=3, saving={"save_every": 2}, run={"check_replicas": 1})
    if variant == "cispo":
        base = tiny_runs.changed(  # type: ignore[type-var]
            base, num_steps=4, rollouts={"updates_per_rollout": 2}
        )
    results = {}
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        shutil.copytree(start, folder)
        cfg = base
        if variant == "dpo":
            cfg = replace(cfg, algo="dpo", preferences=Preferences(str(prefer(folder)), beta=0.5))
        processes.run_ranks(run_rank, world_size, folder, cfg)
        results[world_size] = folder
    shutil.copytree(results[2], tmp_path / "moved")
    steps = list_steps(tmp_path / "moved" / "checkpoints" / "rl" / "default")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "rl" / "default" / f"step_{steps[-1]:06d}")
    if variant == "dpo":
        cfg = replace(
            cfg, preferences=replace(cfg.preferences, pairs=str(results[2] / "pairs.jsonl"))
        )
    processes.run_ranks(
        run_rank, 3, tmp_path / "moved", replace(cfg, run=replace(cfg.run, resume=True))
    )
    results[23] = tmp_path / "moved"

    one = weights(results[1])
    # Where a step appears twice, the later line counts.
    logs = {
        name: {record["step"]: record for record in records(folder, "train")}
        for name, folder in results.items()
    }
    for name in (2, 3, 23):
        assert logs[name].keys() == logs[1].keys()
        for step, a in logs[1].items():
            b = logs[name][step]
            assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)
            assert a.get("reward") == pytest.approx(b.get("reward"))
            assert a["tokens"] == b["tokens"]
        other = weights(results[name])
        moved = sum((one[n] - v).abs().sum() for n, v in other.items())
        assert moved / sum(v.abs().sum() for v in one.values()) < 1e-4
        ends = [records(results[k], "eval")[-1] for k in (1, name)]
        assert [end.pop("kind") for end in ends] == ["eval", "eval"]
        assert ends[0] == pytest.approx(ends[1], abs=2e-3, rel=1e-2)
    before = load_file(
        latest(results[1] / "checkpoints" / "sft" / "default") / "model.safetensors"  # type: ignore[operator]
    )
    assert sum((one[n] - v).abs().sum() for n, v in before.items()) > 1, "they did move"


def test_a_stop_signal_saves_and_the_run_goes_on_from_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = runtime.single()
    original = Stage.record

    def stop(stage: Stage, *arguments: Any) -> None:
        original(stage, *arguments)
        rank.stop_signal = stage.state.step == 2

    monkeypatch.setattr(Stage, "record", stop)
    cfg = config(saving={"save_every": 0})
    run(folder, cfg, rank)
    assert list_steps(folder / "checkpoints" / "rl" / "default") == [3]
    monkeypatch.setattr(Stage, "record", original)
    run(folder, replace(cfg, run=replace(cfg.run, resume=True)))
    whole = config(saving={"save_every": 0}, run={"tag": "whole"})
    run(folder, whole)
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(folder, tag="whole")[name])


# Steps without anything to learn


@pytest.mark.parametrize("kind", ["ones", "zeros"])
def test_steps_whose_answers_are_all_alike_are_skipped_and_counted(folder: Path, kind: str) -> None:
    run(folder, config(mix=(f"letters:{kind}",)))
    steps = records(folder, "train")
    assert len(steps) == 6
    assert all(record["skipped"] for record in steps)
    assert all(record["kept_groups"] == 0 and "loss" not in record for record in steps)
    start = latest(folder / "checkpoints" / "sft" / "default")
    assert start is not None
    for name, value in load_file(start / "model.safetensors").items():
        assert torch.equal(value, weights(folder)[name])
    evaluation = records(folder, "eval")[-1]
    assert evaluation["pass@4"] == (kind == "ones")
    assert all(math.isfinite(x) for x in evaluation.values() if isinstance(x, float))


def test_a_loss_that_is_not_finite_names_the_step_as_it_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two steps have nothing to tell, so no update came before the third."""
    take_step = policy.PolicyGradient.take_step

    def spoiled(self: Any, stage: Stage, rollout: Any, update: int) -> Any:
        targets = 0 if stage.state.step < 2 else rollout.targets
        spoilt = rollout.advantages * math.nan
        return take_step(self, stage, replace(rollout, targets=targets, advantages=spoilt), update)

    monkeypatch.setattr(policy.PolicyGradient, "take_step", spoiled)
    with pytest.raises(NonFiniteLoss, match="step 3: the loss of rank 0 is nan"):
        run(folder, config())
    assert [record["step"] for record in records(folder, "train")] == [1, 2]


def test_answers_that_are_cut_off_are_counted_and_teach_nothing(folder: Path) -> None:
    """With room for one token no answer ends."""
    run(folder, config(num_steps=2, rollouts={"max_tokens": 1}))
    for record in records(folder, "train"):
        assert record["truncated"] > 0.9
        assert record["skipped"]


def test_prompts_that_are_too_long_are_left_out_and_counted(folder: Path) -> None:
    run(folder, config(mix=("letters:long",)))
    assert sum(record.get("prompts_too_long", 0) for record in records(folder, "train")) > 5
    assert any(record["kept_groups"] > 0 for record in records(folder, "train"))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"group_size": 1}}, "--group-size 1 leaves nothing to compare.*at least 2"),
        ({"rollouts": {"prompts_per_step": 0}}, "--prompts-per-step 0 must be from 1"),
        ({"rollouts": {"temperature": 0.0}}, "temperature 0 draws equal samples"),
        ({"rollouts": {"temperature": 0.3}}, "temperature 0.3 .* at least 0.5"),
        ({"rollouts": {"updates_per_rollout": 4}}, "6 must be a multiple of .* 4"),
        ({"rollouts": {"format_bonus": math.nan}}, "--format-bonus nan"),
        ({"mix": ("letters:bad",)}, "letters/train row 0: the reward is nan"),
        ({"mix": ("letters:text",)}, "letters/train row 0: the reward is 'good'"),
        ({"mix": ("norewards",)}, "letters has no rewards"),
        ({"mix": ("letters:endless",)}, "no held-out prompt has at most"),
        ({"mix": ()}, "--mix names no task"),
        ({"mix": ("poems",)}, "unknown task 'poems'"),
        ({"num_steps": 0}, "--num-steps 0"),
        ({"source": "mid"}, "no checkpoint of mid"),
        ({"algo": "dpo"}, "needs --pairs"),
        ({"algo": "dpo", "preferences": {"pairs": "x", "beta": 0.0}}, "--beta 0.0"),
        ({"algo": "dpo", "preferences": {"pairs": "none.jsonl"}}, "none.jsonl cannot be read"),
    ],
)
def test_bad_input_is_one_clear_error(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, config(**changes))


def test_rewards_that_turn_bad_on_the_way_are_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reward(self: Task, conversation: Conversation, completion: str) -> float:
        return math.inf if completion == BEST else 0.0

    monkeypatch.setattr(Letters, "reward", reward)
    with pytest.raises(UserError, match=r"letters/\w+, answer 'b': the reward is inf"):
        run(folder, config())


def test_a_started_run_is_not_overwritten_and_another_task_is_not_resumed(folder: Path) -> None:
    run(folder, config(num_steps=2))
    with pytest.raises(UserError, match="already holds step_000002"):
        run(folder, config(num_steps=4))
    with pytest.raises(UserError, match="resume with the same --mix"):
        run(folder, config(num_steps=4, run={"resume": True, "seed": 3}))


def numbered(source: Path, target: Path) -> None:
    """A copy of a step folder that holds another step."""
    shutil.copytree(source, target)
    meta = json.loads((target / "meta.json").read_text())
    meta["step"] = int(target.name.removeprefix("step_"))
    meta["digest"] = paths.meta_digest(meta)
    (target / "meta.json").write_text(json.dumps(meta))


def test_a_run_whose_source_was_trained_on_is_not_resumed(folder: Path) -> None:
    run(folder, config(num_steps=2))
    sft = folder / "checkpoints" / "sft" / "default"
    numbered(sft / "step_000080", sft / "step_000099")
    with pytest.raises(UserError, match="sft/default step 80, which has moved on to step_000099"):
        run(folder, config(num_steps=4, run={"resume": True}))
    assert run(folder, config(num_steps=2, run={"tag": "fresh"})).run.source["step"] == 99


@pytest.mark.parametrize("where", ["sft/other", "path"])
def test_a_run_is_not_resumed_from_another_source(folder: Path, where: str) -> None:
    """A checkpoint of the same step would do silently, and KL be to another model."""
    run(folder, config(num_steps=2))
    base = folder / "checkpoints" / "base" / "default" / "step_000002"
    if where == "sft/other":
        cfg = config(run={"tag": "other"}, num_steps=2)
        run(folder, cfg)
        numbered(
            folder / "checkpoints" / "rl" / "other" / "step_000002",
            folder / "checkpoints" / "sft" / "other" / "step_000080",
        )
    source = where if where != "path" else str(base)
    named = "rl/other step 80" if where != "path" else "base/default step 2"
    message = f"rl/default started from sft/default step 80, --source {source} is {named}"
    with pytest.raises(UserError, match=message):
        run(folder, config(num_steps=4, source=source, run={"resume": True}))


def test_a_run_is_not_resumed_with_another_number_of_updates(folder: Path) -> None:
    run(folder, config(num_steps=2))
    changes = {"num_steps": 4, "rollouts": {"updates_per_rollout": 2}}
    with pytest.raises(UserError, match=r"has --updates-per-rollout 1, this run has 2"):
        run(folder, config(**changes, run={"resume": True}))


# Preferences


def dpo(folder: Path, **changes: Any) -> RlConfig:
    cfg = config(algo="dpo", preferences={"pairs": str(prefer(folder, 80)), "beta": 0.5})
    return tiny_runs.changed(cfg, **changes)  # type: ignore[type-var]


@pytest.mark.parametrize("normalised", [False, True])
def test_preferences_are_learned_on_held_out_pairs(folder: Path, normalised: bool) -> None:
    """The preferred answer gains on the other in at least 7 of 8 held-out pairs; at first none."""
    cfg = dpo(folder, num_steps=12, preferences={"length_normalised": normalised})
    run(folder, cfg)
    first, last = records(folder, "eval")
    assert first["pair_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-3)
    assert last["pair_wins"] >= 7 / 8
    assert last["margin"] > 0.5
    assert last["pair_loss"] < 0.6
    losses = [record["loss"] for record in records(folder, "train")]
    assert losses[-1] < losses[0]


def test_the_gradient_is_that_of_the_dpo_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(8, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    for normalised in (False, True):
        scores = pair_scores(
            ours.detach(), reference, lengths, beta=0.7, length_normalised=normalised
        )
        size = lengths if normalised else torch.ones(8)
        ratio = (ours - reference) / size
        loss = -torch.nn.functional.logsigmoid(0.7 * (ratio[0::2] - ratio[1::2]))
        torch.testing.assert_close(scores.losses, loss.detach())
        (gradient,) = torch.autograd.grad(loss.sum(), ours)
        # sum(w nll), and nll = -log p
        torch.testing.assert_close(-scores.weights, gradient)


def test_the_reference_is_computed_once_per_start_and_file(folder: Path) -> None:
    run(folder, dpo(folder, num_steps=1))
    (store,) = (folder / "stores").glob("pairs-*")
    (reference,) = store.glob("reference-*.npy")
    stamp = reference.stat().st_mtime_ns
    run(folder, dpo(folder, num_steps=1, run={"tag": "again"}))
    assert reference.stat().st_mtime_ns == stamp
    reference.write_bytes(b"torn")
    run(folder, dpo(folder, num_steps=1, run={"tag": "torn"}))
    assert reference.stat().st_size > 100
    assert records(folder, "eval", "torn") == records(folder, "eval")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"chosen": "caf\xe9', "line 2: byte 0xe9 at offset 15 is not UTF-8"),
        ("[1]", "line 2: expected an object with messages, chosen, rejected"),
        ({"messages": [], "chosen": "a", "rejected": "b"}, "line 2: 'messages' is empty"),
        ({"chosen": "a", "rejected": "b"}, "line 2: expected an object"),
        ({"chosen": "a", "rejected": 3}, "line 2, rejected: message 1 has the content|expected"),
        ({"chosen": "a", "rejected": "a"}, "line 2: chosen and rejected are equal"),
        ({"chosen": "the king " * 60, "rejected": "a"}, "line 2: with its chosen answer it has"),
    ],
)
def test_bad_pairs_name_their_line_or_are_skipped(folder: Path, line: Any, message: str) -> None:
    cfg = dpo(folder, num_steps=1)
    path = Path(cfg.preferences.pairs)
    if isinstance(line, dict):
        if message.endswith("|expected") or "equal" in message or "with its" in message:
            line = {"messages": [{"role": "user", "content": "who"}], **line}
        line = json.dumps(line)
    first, *rest = path.read_text().splitlines()
    path.write_bytes("\n".join([first, line, *rest]).encode("latin-1"))
    with pytest.raises(UserError, match=message):
        run(folder, cfg)
    run(folder, tiny_runs.changed(cfg, preferences={"bad_rows": "skip"}))  # type: ignore[type-var]
    (store,) = (folder / "stores").glob("pairs-*")
    meta = json.loads((store / "meta.json").read_text())
    assert len(meta["skipped"]) == 1
    assert meta["num_documents"] == 160


def test_a_run_configuration_survives_the_checkpoint(folder: Path) -> None:
    from nanochat.config import from_dict

    cfg = config(num_steps=1)
    run(folder, cfg)
    newest = latest(folder / "checkpoints" / "rl" / "default")
    assert newest is not None
    saved = from_dict(RlConfig, read_meta(newest)["run_config"])
    assert saved == replace(cfg, system="tokens")
    assert to_dict(saved)["rollouts"]["group_size"] == 8
