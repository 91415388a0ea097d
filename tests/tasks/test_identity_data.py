"""The project's own identity conversations: well formed, varied, honest, and free of the held-out
questions with which the trained model's identity is judged."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat.conversation import validate
from nanochat.errors import UserError

PATH = Path(__file__).parents[2] / "tasks" / "data" / "identity_conversations.jsonl"

# Paraphrases of "Who are you?" that no model trained on the file has seen. A model knows who it
# is when it answers these; so they must never enter the file, in any spelling or turn.
HELD_OUT_QUESTIONS = (
    "What are you?",
    "Tell me who you are.",
    "What should I call you?",
    "Could you introduce yourself?",
    "Are you a human or a machine?",
    "Please say your name.",
    "Who am I talking to?",
    "Which model is this?",
    "What kind of program are you?",
    "Give me a short introduction of yourself.",
)

# Words that open or close a question without changing it: "hello, what are you?" is held out too.
FILLERS = {"please", "pls", "hi", "hello", "hey", "good", "morning", "evening", "day", "there"}
FILLERS |= {"so", "now", "then", "well", "ok", "okay", "and", "but", "sorry", "nanochat"}

CONVERSATIONS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def turns(conversation: dict, role: str) -> list[str]:
    return [m["content"] for m in conversation["messages"] if m["role"] == role]


def answered() -> Iterator[tuple[str, str, str]]:
    """(system message or "", question, answer) of every exchange in the file."""
    for conversation in CONVERSATIONS:
        system = "".join(turns(conversation, "system"))
        questions, answers = turns(conversation, "user"), turns(conversation, "assistant")
        for question, answer in zip(questions, answers, strict=True):
            yield system, question, answer


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: "What's this?" -> ["whats", "this"]."""
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).split()


def without_fillers(text: str) -> str:
    return " ".join(word for word in words(text) if word not in FILLERS)


def is_held_out(text: str) -> bool:
    """True if the text, or one of its clauses, is a held-out question up to filler words."""
    held_out = {without_fillers(question) for question in HELD_OUT_QUESTIONS}
    return any(without_fillers(t) in held_out for t in [text, *re.split(r"[.?!,:;]", text)])


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?= |$)", text))


def test_every_line_is_a_valid_conversation_that_alternates() -> None:
    assert 600 <= len(CONVERSATIONS) <= 900
    for i, conversation in enumerate(CONVERSATIONS):
        validate(conversation, f"identity row {i}", last_role="assistant")
        assert conversation.keys() == {"messages"}
        roles = [message["role"] for message in conversation["messages"]]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2), f"row {i}: {roles}"


def test_the_schema_check_is_a_real_one() -> None:
    with pytest.raises(UserError):
        validate({"messages": [{"role": "robot", "content": "Hello."}]}, "identity row 0")


def test_text_is_plain_ascii_without_stray_spaces() -> None:
    assert PATH.read_bytes().isascii()
    for conversation in CONVERSATIONS:
        for message in conversation["messages"]:
            text = message["content"]
            assert text == " ".join(text.split())


def test_first_questions_are_all_different() -> None:
    firsts = [" ".join(words(turns(c, "user")[0])) for c in CONVERSATIONS]
    assert sorted(firsts) == sorted(set(firsts))
    assert all(firsts)


def test_held_out_questions_are_absent() -> None:
    assert len({without_fillers(question) for question in HELD_OUT_QUESTIONS}) == 10
    found = [question for _, question, _ in answered() if is_held_out(question)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "held_out"),
    [
        ("what are you", True),
        ("Hello, what are you?", True),
        ("PLEASE tell me who you are!!", True),
        ("Nice. Which model is this?", True),
        ("What are you good at?", False),
        ("Who are you?", False),
    ],
)
def test_is_held_out_sees_through_case_punctuation_and_fillers(text: str, held_out: bool) -> None:
    assert is_held_out(text) is held_out


def test_who_are_you_is_answered_with_the_core_sentence() -> None:
    answers = [a for system, q, a in answered() if q == "Who are you?" and not system]
    assert answers
    assert all(answer.startswith("I am nanochat, a small language model") for answer in answers)


def test_shares_of_multi_turn_and_system_messages() -> None:
    multi = sum(len(turns(c, "user")) > 1 for c in CONVERSATIONS) / len(CONVERSATIONS)
    system = sum(bool(turns(c, "system")) for c in CONVERSATIONS) / len(CONVERSATIONS)
    assert 0.20 <= multi <= 0.30
    assert 0.10 <= system <= 0.15


def test_questions_vary_much_more_than_answers() -> None:
    questions = {question for _, question, _ in answered()}
    answers = {answer for _, _, answer in answered()}
    assert len(questions) > 900
    assert 100 <= len(answers) <= 250


def test_some_questions_are_typed_in_haste() -> None:
    firsts = [turns(c, "user")[0] for c in CONVERSATIONS]
    hasty = sum(q == q.lower() and q[-1].isalnum() for q in firsts) / len(firsts)
    assert 0.10 <= hasty <= 0.40


def test_answers_are_short() -> None:
    for _, question, answer in answered():
        assert len(answer.split()) <= 60, question
        assert answer[-1] in ".!?", answer


IDENTITY = re.compile(
    r"\bwho (are|r) (you|u|yuo)\b|\bwho is (this|it|there)\b|\bwho am i \w+ (to|with)\b"
    r"|\b(is|was|say|tell me) your name\b|\bname do you\b|\bcall you\b|\bare you called\b"
    r"|\b(which|what) (language )?(model|llm|ai|bot) (are|is|am)\b"
    r"|\bintroduce yourself\b|\babout yourself\b|\b(what|who) you are\b(?! good)"
)


def test_identity_questions_are_answered_with_the_name() -> None:
    identity = [(q, a) for _, q, a in answered() if IDENTITY.search(q.lower())]
    assert len(identity) > 250
    for question, answer in identity:
        assert "nanochat" in answer, (question, answer)


OTHERS = re.compile(
    r"chatgpt|\bgpt|claude|gemini|siri|alexa|llama|bard|copilot|openai|google|deepseek|grok", re.I
)


def test_questions_about_other_models_are_denied() -> None:
    asked = [(q, a) for _, q, a in answered() if OTHERS.search(q) and "for me" not in q]
    assert len(asked) > 20
    for question, answer in asked:
        assert answer.startswith("No"), (question, answer)


# A sentence about one of these abilities must deny it.
LACKING = re.compile(r"\b(internet|memory|images?|feelings|voice|ears|clock|home|age|favorite)\b")
DENIES = re.compile(r"\b(no|not|cannot)\b", re.I)
FALSE_CLAIMS = re.compile(
    r"\bI (remember|feel|see (?!no)|hear|love)\b|\bI am (a |an )?(human|person|man|woman|alive)\b"
    r"|\bI can (see|hear|search|remember|browse)\b",
    re.I,
)


def honest(answer: str) -> bool:
    parts = re.split(r"(?<=[.!?]) ", answer)
    denied = all(DENIES.search(part) for part in parts if LACKING.search(part))
    return denied and not FALSE_CLAIMS.search(answer) and not OTHERS.search(answer)


def test_no_answer_claims_what_the_model_cannot_do() -> None:
    dishonest = [answer for _, _, answer in answered() if not honest(answer)]
    assert dishonest == []


@pytest.mark.parametrize(
    "claim",
    [
        "Yes, I have internet.",
        "I can see images.",
        "I am a person.",
        "I am ChatGPT.",
        "I feel sad.",
    ],
)
def test_honest_catches_claims(claim: str) -> None:
    assert not honest(claim)


def ends_with_good_day(answer: str) -> bool:
    return answer.endswith(" Have a good day.")


# What a system message asks for; one that is not listed asks for nothing that can be checked.
OBEYS: dict[str, Callable[[str], bool]] = {
    "Answer in one sentence.": lambda a: sentences(a) == 1,
    "Use one sentence only.": lambda a: sentences(a) == 1,
    "Please answer with one sentence.": lambda a: sentences(a) == 1,
    "Answer in two sentences.": lambda a: sentences(a) == 2,
    "Answer in one word.": lambda a: len(a.split()) == 1,
    "Answer with yes or no.": lambda a: a in ("Yes.", "No."),
    "Say hello first.": lambda a: a.startswith("Hello! "),
    "Begin each answer with hello.": lambda a: a.startswith("Hello! "),
    "End each answer with: Have a good day.": ends_with_good_day,
    "Be short.": lambda a: len(a.split()) <= 8,
    "Keep your answers short.": lambda a: len(a.split()) <= 8,
}
UNCHECKED = {
    "You are nanochat, a helpful small model.",
    "You are nanochat, a small language model.",
    "You are nanochat, made by the nanochat project.",
    "You are a helpful model named nanochat.",
    "Be helpful and kind.",
    "Help the user.",
}


def test_system_messages_are_obeyed() -> None:
    seen = set()
    for system, question, answer in answered():
        if not system:
            continue
        seen.add(system)
        if system in OBEYS:
            assert OBEYS[system](answer), (system, question, answer)
        else:
            assert system in UNCHECKED, system
    assert seen == OBEYS.keys() | UNCHECKED


def test_a_request_to_repeat_brings_the_same_answer() -> None:
    repeats = 0
    for conversation in CONVERSATIONS:
        questions, answers = turns(conversation, "user"), turns(conversation, "assistant")
        for i in range(1, len(questions)):
            if re.search(
                r"repeat that|what did you say\b(?! to)|say (it|that) again", questions[i], re.I
            ):
                assert answers[i] == answers[i - 1]
                repeats += 1
    assert repeats >= 5
