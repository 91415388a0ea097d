"""chat_eval: right answers are counted right, whatever the batch size and the number of ranks."""

import dataclasses
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from nanochat.errors import UserError
from nanochat.eval.results import wilson_interval
from nanochat.runtime import Runtime, single
from scripts import chat_eval
from scripts.chat_eval import Config, encode_options, evaluate_task
from tasks.common import Conversation, Task, pass_at_k


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
    """Whatever is said is right or wrong by its hash: any other token would show."""

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
GENERATIVE = Config(batch_size=8, num_samples=3, temperature=1.0, max_tokens=6, pass_at=(1, 2, 3))


def evaluate(task: Task, cfg: Config, runtime: Runtime | None = None) -> dict[str, Any]:
    return evaluate_task(tiny_model(), tiny_tokenizer(), task, cfg, runtime or single())


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


def test_another_seed_draws_other_samples() -> None:
    answers = {
        evaluate(Writing(), dataclasses.replace(GENERATIVE, seed=seed))["correct"]
        for seed in range(4)
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
    cfg = dataclasses.replace(GENERATIVE, pass_at=(1, 2, 3, 10))
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

    cfg = dataclasses.replace(GENERATIVE, max_problems=4, num_samples=1)
    assert evaluate(Watched(), cfg)["total"] == 4
    assert sorted(set(seen)) == [0, 3, 6, 9]


def test_results_by_kind_and_some_exchanges() -> None:
    class Kinds(Writing):
        BY_KIND = True

        def row(self, index: int) -> Conversation:
            return {**super().row(index), "kind": ("sums", "sums", "talk")[index % 3]}

        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            return bool(conversation["kind"] == "sums")

    result = evaluate(Kinds(), dataclasses.replace(GENERATIVE, num_samples=1))
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
    table = chat_eval.make_table({"x": {**result, "truncated": 0}}, "t")
    assert table.row_count == 3


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model called sft/try, step 7, and tasks called choosing and writing."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    meta = {"stage": "sft", "tag": "try", "step": 7}
    monkeypatch.setattr(
        chat_eval, "load_model", lambda *args, **kwargs: (tiny_model(), tiny_tokenizer(), meta)
    )
    tasks = {"choosing": Choosing, "writing": Writing}
    monkeypatch.setattr(chat_eval, "build", lambda spec, split: tasks[spec]())
    return tmp_path / "report" / "eval_sft-try.json"


def test_main_writes_what_it_prints_and_keeps_other_tasks(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Config(task=("choosing",), show=2, batch_size=4, max_tokens=4)
    chat_eval.main(cfg, single())
    out = capsys.readouterr().out
    assert out.count("--- choosing/test row") == 2
    assert "ChatCORE" in out
    record = chat_eval.main(dataclasses.replace(cfg, task=("writing",)), single())
    assert json.loads(checkpoint.read_text()) == record
    assert (record["stage"], record["tag"], record["step"]) == ("sft", "try", 7)
    assert list(record["results"]) == ["choosing", "writing"]
    assert record["chat_core"] == pytest.approx(
        sum(result["centered"] for result in record["results"].values()) / 2
    )
    out = capsys.readouterr().out
    assert out.count("--- writing/test row") == 2
    assert "user: 0\nanswer: " in out
    assert "(right, " in out or "(wrong, " in out


def test_what_cannot_be_measured_is_explained(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            chat_eval.main(Config(**{"task": ("writing",), **settings}), single())

    fails("--max-problems 0", max_problems=0)
    fails("--batch-size 0", batch_size=0)
    fails("--temperature 0 gives equal samples", num_samples=2)
    monkeypatch.setattr(chat_eval, "build", lambda spec, split: Writing(0))
    fails("writing: the split 'test' is empty")
    monkeypatch.setattr(Writing, "evaluate", Task.evaluate)
    monkeypatch.setattr(chat_eval, "build", lambda spec, split: Writing())
    fails("writing has no answers to check")
    assert not checkpoint.exists()
