"""Asking in many ways, plain sums, and the judges that read an answer in full."""

import re
from random import Random

import pytest

from nanochat.tools.calculator import calculate
from tasks import asking, followups, identity, ignorance, passages, spellingbee, sums
from tasks.arithmetic import Arithmetic
from tasks.asking import Ways, ask, expand, loosen, normal, reserved, slip
from tasks.common import split_of
from tasks.judges import WordPairs, judge, reference

ALL_WAYS = [
    (f"{module.__name__}.{name}.{key}", ways)
    for module in (asking, followups, ignorance, passages, spellingbee, sums)
    for name, value in vars(module).items()
    for key, ways in (value.items() if isinstance(value, dict) else [("", value)])
    if isinstance(ways, Ways)
] + [(f"identity.{intent.name}", intent.ways) for intent in identity.read_intents()]


@pytest.mark.parametrize(("name", "ways"), ALL_WAYS)
def test_no_way_of_asking_is_both_trained_and_held_out(name: str, ways: Ways):
    shortest = 2 if "OPENERS" in name or "CLOSERS" in name or name.startswith("identity") else 4
    for pattern in (*ways.train, *ways.held_out):
        assert isinstance(pattern, str)
        assert len(pattern) >= shortest, (name, pattern)
        assert pattern.count("(") == pattern.count(")"), (name, pattern)
    trained = {expand(pattern, Random(i)) for pattern in ways.train for i in range(40)}
    tested = {expand(pattern, Random(i)) for pattern in ways.held_out for i in range(40)}
    assert {normal(x.lstrip("!?.")) for x in trained}.isdisjoint(
        {normal(x.lstrip("!?.")) for x in tested}
    ), name


def test_a_way_gives_many_messages_and_keeps_what_it_is_to_keep():
    ways = Ways(
        ("!go on with {text} about {word}", "?what of {word}: {text}"), ("!carry on {text}",)
    )
    messages = [
        ask(Random(i), "train", ways, {"word": "house"}, {"text": "In the {a} End"})
        for i in range(400)
    ]
    assert len(set(messages)) > 100
    assert all("In the {a} End" in message for message in messages)
    assert all("house" in message.lower() for message in messages)
    assert any(message.endswith("In the {a} End") for message in messages)
    assert any("HOUSE" in message for message in messages)
    tested = [ask(Random(i), "test", ways, {"word": "house"}, {"text": "x"}) for i in range(50)]
    assert all(re.search("car+r?y|[a-z]* on", message.lower()) for message in tested)
    assert not any("go on with" in message for message in tested)


def test_a_loosened_message_lacks_or_gains_a_small_word_and_keeps_its_values():
    text = "how many of {letter} are in the word {word}"
    found = [loosen(text, Random(i)) for i in range(300)]
    lengths = {len(message.split()) - len(text.split()) for message in found}
    assert lengths >= {-1, 0, 1}
    for message in found:
        assert re.findall(r"\{\w+\}", message) == ["{letter}", "{word}"]
        # A word before a value could be taken for it.
        before = {message.split(value)[0].split()[-1] for value in ("{letter}", "{word}")}
        assert before <= set(text.split()), message


def test_a_slip_is_one_letter_and_spares_the_values():
    for i in range(200):
        text = slip("please count {letters} here", Random(i))
        assert "{letters}" in text
        assert abs(len(text) - len("please count {letters} here")) <= 1


def test_a_message_of_first_contact_is_not_asked_in_training(monkeypatch: pytest.MonkeyPatch):
    assert normal('Spell "Bread".') in reserved()
    ways = Ways(("Spell {word}", "Say the letters of {word}"), ())
    messages = {ask(Random(i), "train", ways, {"word": "bread"}) for i in range(200)}
    assert messages == {"Say the letters of bread"}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_plain_sums_are_what_their_messages_say(split: str):
    task = Arithmetic(split, size=400, level=0)
    calls = set()
    for row in task:
        message, call = row["messages"][0]["content"], row["skeleton"]
        assert split_of(call) == split
        assert row["answer"] == calculate(call)
        numbers = re.findall(r"\d+", message)
        assert all(int(n) <= 1000 for n in numbers)
        if "squared" not in message.lower() and len(numbers) == len(re.findall(r"\d+", call)):
            assert sorted(numbers) == sorted(re.findall(r"\d+", call)), (message, call)
        assert call.count("(") == message.count("(")
        calls.add(call)
        said = f"That is {row['answer']}."
        assert task.reward(row, said) == 1.0
        assert not task.evaluate(row, f"That is 9{row['answer'].lstrip('-')}.")
        assert not task.evaluate(row, "I do not know.")
    assert len(calls) > 300
    assert min(sum(sign in call for call in calls) for sign in "+-*/(") > 15


def test_a_hundred_in_words_may_be_any_number_of_a_sum():
    """`one hundred` has a space, and a request names its two numbers in places of their own."""
    asked = set()
    for i in range(20_000):
        random = Random(i)
        shape, said, call = sums.draw_sum(random, "train")
        if "hundred" in said:
            assert "hundred" in sums.ask_sum(random, "train", shape, said).lower()
            assert "100" in call
            asked.add(shape)
    assert asked >= {"+", "-", "*", "/", "words"}


@pytest.mark.parametrize(
    ("said", "call"),
    [("take 4 from 19", "19-4"), ("divide 12 by 3", "12/3"), ("add 2 to 3", "2+3")],
)
def test_requests_name_the_numbers_in_their_own_order(said: str, call: str):
    sign = call[2] if call[1].isdigit() else call[1]
    a, b = call.split(sign)
    messages = {
        ask(Random(i), "train", sums.REQUESTED[sign], {"a": a, "b": b}).lower() for i in range(300)
    }
    assert any(said in message for message in messages)


@pytest.mark.parametrize(
    ("check", "answer", "right"),
    [
        ({"spell": ["water"]}, "w a t e r", True),
        ({"spell": ["Water"]}, "w a t e r", True),
        ({"spell": ["water"]}, "w a t e", False),
        ({"count": "tree", "letter": "e"}, "t r e e\nPython says 2.\n#### 2", True),
        ({"count": "tree", "letter": "e"}, "t r i e\nPython says 2.\n#### 2", False),
        ({"count": "tree", "letter": "x"}, "t r e e\nPython says 0.\n#### 0", True),
        ({"sum": "7/2"}, "That is 3.5.", True),
        ({"sum": "2+3"}, "2+3 is 6.", False),
        ({"sum": "5-9"}, "That is -4.", True),
        ({"sum": "600*2"}, "That is 1,200.", True),
        ({"about": "fox"}, "The fox ran over the wall.", True),
        ({"about": "fox"}, "The foxes ran over the wall.", False),  # not in the corpus' pairs
        ({"about": "dog"}, "The fox ran over the wall.", False),
        ({"about": "fox"}, "I do not know the fox over there.", False),
        ({"about": "fox"}, "fox fox fox fox", False),
        ({"continue": "The fox"}, "ran over the wall.", True),
        ({"continue": "The fox"}, "wall.", False),
        ({"unknown": "?"}, "I do not know. I can spell words.", True),
        ({"unknown": "?"}, "I do not know.", False),
        ({"unknown": "?"}, "I can spell words.", False),
        ({"says": ["nanochat", "model"]}, "I am Nanochat.", True),
        ({"says": ["nanochat", "model"]}, "I am a fox.", False),
    ],
)
def test_judges(check: dict, answer: str, right: bool):
    pairs = WordPairs(["The fox ran over the wall. The fox, I do not know the dog."])
    assert judge(check, answer, pairs) is right


@pytest.mark.parametrize(
    "check", [{"spell": ["water", "ox"]}, {"count": "tree", "letter": "e"}, {"sum": "(2+3)*4"}]
)
def test_the_reference_is_right(check: dict):
    content = reference(check)
    texts = (
        [content]
        if isinstance(content, str)
        else [p["text"] for p in content if p["type"] == "text"]
    )
    assert judge(check, "".join(texts))
