"""chat_eval: right answers are counted right, whatever the batch size and the number of ranks."""

import dataclasses
import hashlib
import json
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import processes
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from nanochat.errors import UserError
from nanochat.eval.record import labels, problems_path
from nanochat.eval.results import clustered_interval, mcnemar, pass_at_k, wilson_interval
from nanochat.runtime import Runtime, single
from scripts import chat_eval
from scripts.chat_eval import Answering, Asked, Config, encode_options, majority
from tasks.common import Conversation, Task


class Choosing(Task):
    """Questions with 2 or 4 options, of one or several tokens; any option may be right."""

    eval_type = "categorical"

    def __init__(self, letters: tuple[str, ...] = ("a", "b", "k", "w"), size: int = 30):
        super().__init__("choosing", "test")
        self.letters, self.size = letters, size

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        return {}

    def row(self, index: int) -> Conversation:
        letters = list(self.letters[: 2 if index % 3 == 0 else 4])
        question = "what is the sea? " * (index % 4) + f"{index} and {7 * index % 30}"
        answer = letters[index % len(letters)]
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "letters": letters,
            "answer": answer,
        }


class Writing(Task):
    """Answers are right or wrong by their hash: any other token would show."""

    def __init__(self, size: int = 12):
        super().__init__("writing", "test")
        self.size = size

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        return {}

    def row(self, index: int) -> Conversation:
        text = "say a word " * (index % 3) + str(index)
        return {"messages": [{"role": "user", "content": text}]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        said = f"{conversation['messages'][0]['content']}: {completion}"
        return hashlib.sha256(said.encode()).digest()[0] % 2 == 0


LONG_OPTIONS = ("the king", "the", "a word", "sea")
CATEGORICAL = Config(batch_size=8)
GENERATIVE = Config(
    batch_size=8,
    answering=Answering(num_samples=3, temperature=1.0, max_tokens=6, pass_at=(1, 2, 3)),
)


def answering(cfg: Config, **changes: Any) -> Config:
    return dataclasses.replace(cfg, answering=dataclasses.replace(cfg.answering, **changes))


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    cfg: Config,
    runtime: Runtime,
    examples: Any = (),
) -> Any:
    return Asked(task, examples, tokenizer, "tokens", cfg, runtime).measure(model, task.name)


def evaluate(task: Task, cfg: Config, runtime: Runtime | None = None) -> dict[str, Any]:
    return evaluate_task(tiny_model(), tiny_tokenizer(), task, cfg, runtime or single())[0]


@pytest.mark.parametrize("letters", [("a", "b", "k", "w"), LONG_OPTIONS])
def test_the_most_likely_option_is_chosen(letters: tuple[str, ...]) -> None:
    """Against scoring every option by a forward pass of its own."""
    model, tokenizer, task = tiny_model(), tiny_tokenizer(), Choosing(letters)
    several = any(len(tokenizer.encode(letter)) > 1 for letter in letters)
    assert several == (letters == LONG_OPTIONS)
    right, chance = 0, 0.0
    for conversation in task:
        prompt = tokenizer.render_for_completion(conversation)
        values = []
        for letter in conversation["letters"]:
            ids = tokenizer.encode(letter)
            if several:
                ids = [*ids, tokenizer.special("<|assistant_end|>")]
            row = torch.tensor([prompt + ids])
            logprobs = model(row)[0].log_softmax(-1)[len(prompt) - 1 : -1]
            values.append(logprobs.gather(1, torch.tensor(ids)[:, None]).sum().item())
        chosen = conversation["letters"][values.index(max(values))]
        right += chosen == conversation["answer"]
        chance += 1 / len(values) / len(task)
    assert 3 < right < 27
    result = evaluate(task, CATEGORICAL)
    assert result["correct"] == right
    assert result["total"] == 30
    assert result["chance"] == pytest.approx(chance)
    assert result["accuracy"] == right / 30
    assert result["centered"] == pytest.approx((right / 30 - chance) / (1 - chance))
    assert result["ci"] == list(wilson_interval(right, 30))


def test_options_of_several_tokens_are_compared_as_whole_answers() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.special("<|assistant_end|>")
    assert encode_options(tokenizer, ["a", "b"]) == [tokenizer.encode("a"), tokenizer.encode("b")]
    options = encode_options(tokenizer, ["the", "the king"])
    assert [option[-1] for option in options] == [end, end]
    assert tokenizer.decode(options[1][:-1]) == "the king"


def both(runtime: Runtime, batch_size: int) -> list[dict[str, Any]]:
    """A categorical and a generative task on one rank of a job."""
    tasks = [(Choosing(LONG_OPTIONS), CATEGORICAL), (Writing(20), GENERATIVE)]
    return [
        evaluate(task, dataclasses.replace(cfg, batch_size=batch_size), runtime)
        for task, cfg in tasks
    ]


def test_results_depend_neither_on_batch_size_nor_on_ranks() -> None:
    expected = both(single(), 8)
    assert 0 < expected[1]["accuracy"] < 1
    for batch_size in (5, 64):
        assert both(single(), batch_size) == expected
    assert processes.run_ranks(both, 2, 3) == [expected, expected]


def open_in_turn(rank: Runtime, folder: Path) -> bool:
    """Open the tasks of a chat_eval on one rank; returns whether the data was there already."""
    marker, found = folder / "prepared", []

    class Opened(Exception):
        pass

    def build(*_: Any, **__: Any) -> Task:
        found.append(marker.exists())
        time.sleep(0.2)  # ranks that do not wait look for it in this time
        marker.touch()
        return Choosing()

    def stop(*_: Any) -> None:
        raise Opened

    changes: dict[str, Any] = {
        "find": lambda *_: folder,
        "read_meta": lambda _: {},
        "tokenizer_of": lambda *_: None,
    }
    changes |= {"corpus_options": lambda *_: {}, "build": build, "Asked": stop}
    with pytest.MonkeyPatch.context() as patch:
        for name, change in changes.items():
            patch.setattr(chat_eval, name, change)
        with pytest.raises(Opened):
            chat_eval.main(Config(task=("choosing",)), rank)
    return found[0]


def test_data_sets_are_prepared_by_one_rank_first(tmp_path: Path) -> None:
    assert processes.run_ranks(open_in_turn, 2, tmp_path) == [False, True]


def test_another_seed_draws_other_samples() -> None:
    answers = {
        evaluate(Writing(), answering(GENERATIVE, seed=seed))["correct"] for seed in range(4)
    }
    assert len(answers) > 1


class Counting(Writing):
    """The first i samples of problem i that are judged are right."""

    def __init__(self) -> None:
        super().__init__(4)
        self.asked: dict[str, int] = {}
        self.lock = threading.Lock()

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        text = conversation["messages"][0]["content"]
        with self.lock:  # answers are judged in threads
            self.asked[text] = self.asked.get(text, 0) + 1
            return self.asked[text] <= int(text.split()[-1])


def test_pass_at_k_of_several_samples() -> None:
    cfg = answering(GENERATIVE, pass_at=(1, 2, 3, 10))
    result = evaluate(Counting(), cfg)
    assert result["samples"] == 3
    assert result["correct"] == pytest.approx((0 + 1 + 2 + 3) / 3)
    assert result["accuracy"] == pytest.approx(0.5)
    assert list(result["pass_at"]) == ["1", "2", "3"]
    for k in (1, 2, 3):
        expected = sum(pass_at_k(3, right, k) for right in range(4)) / 4
        assert result["pass_at"][str(k)] == pytest.approx(expected)
    assert result["pass_at"]["1"] == pytest.approx(result["accuracy"])


def test_long_prompts_are_cut_from_the_left_counted_and_still_answered() -> None:
    class Long(Choosing):
        def row(self, index: int) -> Conversation:
            conversation = super().row(index)
            if index < 4:
                conversation["messages"][0]["content"] *= 1 + 40 * (index % 2)
                conversation["messages"][0]["content"] += "no" * 60 * (index % 2)
            return conversation

    class LongWriting(Writing):
        def row(self, index: int) -> Conversation:
            text = "naïve " * 60 if index == 5 else "king"
            return {"messages": [{"role": "user", "content": text}]}

    result = evaluate(Long(), CATEGORICAL)
    assert (result["truncated"], result["total"]) == (2, 30)
    assert evaluate(Long(LONG_OPTIONS), CATEGORICAL)["truncated"] == 2
    result = evaluate(LongWriting(), GENERATIVE)
    assert (result["truncated"], result["total"]) == (1, 12)


def test_problems_of_a_quick_look_are_spread_over_the_task() -> None:
    seen = []

    class Watched(Writing):
        def row(self, index: int) -> Conversation:
            seen.append(index)
            return super().row(index)

    cfg = answering(dataclasses.replace(GENERATIVE, max_problems=4), num_samples=1)
    assert evaluate(Watched(), cfg)["total"] == 4
    assert sorted(set(seen)) == [0, 3, 6, 9]


def test_results_by_kind_and_some_exchanges() -> None:
    class Kinds(Writing):
        BY_KIND = True

        def row(self, index: int) -> Conversation:
            return {**super().row(index), "kind": ("sums", "sums", "talk")[index % 3]}

        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            return bool(conversation["kind"] == "sums")

    result = evaluate(Kinds(), answering(GENERATIVE, num_samples=1))
    kinds = result["kinds"]
    assert list(kinds) == ["sums", "talk"]
    assert kinds["sums"]["accuracy"] == 1.0
    assert kinds["talk"]["accuracy"] == 0.0
    assert kinds["sums"]["total"] + kinds["talk"]["total"] == result["total"]
    shown = result["exchanges"]
    assert len(shown) == min(chat_eval.MAX_EXCHANGES, result["total"])
    assert [one["kind"] for one in shown[:4]] == ["sums", "talk", "sums", "talk"]
    assert [one["right"] for one in shown[:2]] == [True, False]
    assert shown[0]["messages"][0][0] == "user"
    table = chat_eval.make_table({"x": {"result": result, "settings": {"of": 12}}}, "t")
    assert table.row_count == 3


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints sft/try and mid/try, step 7, and tasks called choosing and writing."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def meta(source: str) -> dict[str, Any]:
        return {"stage": source, "tag": "try", "step": 7}

    monkeypatch.setattr(chat_eval, "find", lambda source, step: source)
    monkeypatch.setattr(chat_eval, "read_meta", lambda folder: meta(folder))
    monkeypatch.setattr(chat_eval, "tokenizer_of", lambda meta, folder: tiny_tokenizer())
    monkeypatch.setattr(
        chat_eval,
        "load_model",
        lambda source, *_, **__: (tiny_model(seed=len(source) % 2), tiny_tokenizer(), meta(source)),
    )
    tasks = {"choosing": Choosing, "writing": Writing}
    monkeypatch.setattr(chat_eval, "build", lambda spec, split, **_: tasks[spec]())
    return tmp_path / "report" / "eval_sft-try.json"


TINY = answering(Config(source="sft", batch_size=4), max_tokens=4)


def test_main_writes_what_it_prints_and_keeps_other_tasks(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = dataclasses.replace(TINY, task=("choosing",), show=2)
    first = chat_eval.main(cfg, single())["choosing"]
    out = capsys.readouterr().out
    assert out.count("--- choosing/test row") == 2
    assert "ChatCORE" not in out, "neither task is of a set"
    second = chat_eval.main(dataclasses.replace(cfg, task=("writing",)), single())["writing"]
    known = json.loads(checkpoint.read_text())
    assert (known["stage"], known["tag"]) == ("sft", "try")
    assert known["measured"] == [first, second]
    assert second["settings"]["problems"] == second["settings"]["of"] == 12
    out = capsys.readouterr().out
    assert out.count("--- writing/test row") == 2
    assert "user: 0\nanswer: " in out
    assert "(right, " in out or "(wrong, " in out


def test_every_problem_is_a_line_and_stages_are_compared(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = dataclasses.replace(TINY, task=("choosing", "writing"))
    before = chat_eval.main(dataclasses.replace(cfg, source="base"), single())
    after = chat_eval.main(dataclasses.replace(cfg, against="base"), single())
    out = capsys.readouterr().out
    for spec, one in after.items():
        lines = [
            [json.loads(line) for line in problems_path(side).read_text().splitlines()]
            for side in (before[spec], one)
        ]
        assert [line["problem"] for line in lines[1]] == list(range(one["result"]["total"]))
        assert sum(line["right"] for line in lines[1]) == one["result"]["correct"]
        assert all(line["answers"] for line in lines[1])
        pairs = [(a["right"], b["right"]) for a, b in zip(*lines, strict=True)]
        gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
        assert gained + lost > 0
        expected = f"{spec}: against base/try step 7 {gained} more problems are right and {lost} no"
        assert expected in out
        assert f"p = {mcnemar(gained, lost):.3g}" in out
    chat_eval.main(dataclasses.replace(cfg, against="base", max_problems=3), single())
    assert "base/try step 7 was not measured with these settings" in capsys.readouterr().out


class Exam(Choosing):
    """Questions of two subjects; the examples of each tell its name."""

    SHOTS_FROM = "dev"

    def __init__(self, split: str = "test"):
        super().__init__(size=12)
        self.split = split

    def row(self, index: int) -> Conversation:
        conversation = super().row(index)
        subject = ("sea", "king")[index % 2]
        if self.split == "dev":
            conversation["messages"][0]["content"] = f"{subject} {index}"
        return {**conversation, "subject": subject}


def test_examples_of_the_subject_stand_before_the_question(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_eval, "build", lambda spec, split, **_: Exam(split))
    asked: list[list[str]] = []
    tokenizer = tiny_tokenizer()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def render_for_completion(self, conversation: Conversation, system: Any) -> list[int]:
            asked.append([m["content"] for m in conversation["messages"] if m["role"] == "user"])
            return tokenizer.render_for_completion(conversation, system)

    cfg = dataclasses.replace(TINY, task=("exam",), shots=2)
    examples = chat_eval.load_examples("exam", Exam(), 2)
    model = tiny_model()
    long = dataclasses.replace(model.config, context_length=2000)
    model.config = long
    result, _ = evaluate_task(model, Watched(), Exam(), cfg, single(), examples)
    assert result["truncated"] == 0
    shown = {tuple(turns[:-1]) for turns in asked}
    assert shown == {("sea 0", "sea 2"), ("king 1", "king 3")}
    subjects = result["by_subject"]
    assert list(subjects) == ["king", "sea"]
    assert sum(one["correct"] for one in subjects.values()) == result["correct"]
    assert sum(one["total"] for one in subjects.values()) == 12

    # In a short context examples give way before the question does.
    asked.clear()
    lengths = [len(tokenizer.render_for_completion(Exam()[i])) for i in range(12)]
    model.config = dataclasses.replace(long, context_length=max(lengths) + 12)
    result, _ = evaluate_task(model, Watched(), Exam(), cfg, single(), examples)
    assert result["truncated"] > 0
    assert min(len(turns) for turns in asked) < 3, "some were asked with fewer examples"
    assert not any(turns[-1].startswith(("sea", "king")) for turns in asked)

    measured = chat_eval.main(cfg, single())["exam"]
    assert labels([measured]) == ["exam, 2 shots"]
    with pytest.raises(UserError, match="--shots 9: exam has only 6 examples"):
        chat_eval.main(dataclasses.replace(cfg, shots=9), single())


def test_votes_are_counted() -> None:
    assert majority(["a", "b", "b", None, None, None], [True, False, False, True, True, True]) is (
        False
    )
    assert majority(["a", "b"], [True, False]), "of equally many the first one"
    assert not majority([None, None], [True, True])

    class Voting(Writing):
        """Half of the samples of each problem say "1", and the rest differ."""

        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            return self.vote(conversation, completion) == 1

        def vote(self, conversation: Conversation, completion: str) -> int:
            return len(completion) % 2

    cfg = answering(GENERATIVE, num_samples=9, max_tokens=3)
    result, problems = evaluate_task(tiny_model(), tiny_tokenizer(), Voting(), cfg, single())
    for one in problems:
        assert one["majority"] == (one["right"] > 4)
        assert len(one["verdicts"]) == len(one["answers"]) == 9
    assert result["majority"] == sum(one["right"] > 4 for one in problems) / len(problems)
    assert "majority" not in evaluate(Writing(), GENERATIVE), "its answers cannot be counted"


def test_the_interval_of_several_samples_is_of_problems_not_alike() -> None:
    """Simulated: it holds the truth 19 times in 20, and is narrower than that of N answers."""
    random, samples, count = Random(0), 16, 100
    held, narrower = 0, []
    for _ in range(300):
        chances = [random.betavariate(2, 3) for _ in range(count)]
        hits = [sum(random.random() < p for _ in range(samples)) for p in chances]
        low, high = clustered_interval(hits, samples)
        held += low <= 0.4 <= high
        wide = wilson_interval(sum(hits) / samples, count)
        narrower.append((high - low) / (wide[1] - wide[0]))
    assert 275 <= held <= 295
    assert 0.4 < sum(narrower) / len(narrower) < 0.6
    same = [samples, 0] * 10
    assert clustered_interval(same, samples) == pytest.approx(wilson_interval(10, 20), abs=0.01)
    assert clustered_interval([0] * 20, samples) == wilson_interval(0, 20)
    result = evaluate(Writing(20), GENERATIVE)
    wide = wilson_interval(result["correct"], 20)
    assert result["ci"][1] - result["ci"][0] < wide[1] - wide[0]


def test_what_cannot_be_measured_is_explained(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(match: str, cfg: Config) -> None:
        with pytest.raises(UserError, match=match):
            chat_eval.main(dataclasses.replace(cfg, task=("writing",)), single())

    fails("--max-problems 0", Config(max_problems=0))
    fails("--batch-size 0", Config(batch_size=0))
    fails("--shots -1", Config(shots=-1))
    fails("--temperature 0 gives equal samples", answering(Config(), num_samples=2))
    monkeypatch.setattr(chat_eval, "build", lambda spec, split, **_: Writing(0))
    fails("writing: the split 'test' is empty", Config())
    monkeypatch.setattr(Writing, "evaluate", Task.evaluate)
    monkeypatch.setattr(chat_eval, "build", lambda spec, split, **_: Writing())
    fails("writing has no answers to check", Config())
    assert not checkpoint.exists()
