"""Follow-ups: conversations of two to four turns in which a turn may need those before it.

    Spell water.      > w a t e r             How many e are in people?   > ... #### 2
    and river?        > r i v e r             and p?                      > ... #### 2
    count the r       > ... #### 2            spell it                    > p e o p l e

Topics change too: a question of any other task may come next, then thanks.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from nanochat.errors import UserError
from nanochat.tools.calculator import calculate
from tasks.asking import Ways, ask
from tasks.common import Conversation, Task, check_generated, digest, row_random, split_of
from tasks.identity import INTENTS, ask_intent, read_intents
from tasks.ignorance import draw_answer, draw_unknown, unheard
from tasks.judges import Check, Content, judge, reference
from tasks.passages import draw_passage, index_of, known_texts, pairs_of
from tasks.spellingbee import COUNTING, SPELLING, load_words, quoted, words_of
from tasks.sums import ask_sum, draw_number, draw_sum

AND_WORD = Ways(
    train=(
        *("?and {word}", "?and {word}", "?and of {word}", "?what about {word}", "!now {word}"),
        *(".{word}", "?and (the word|) {word}", "!(do|try) {word}", "?how about {word}"),
        *("!the same (for|with) {word}", ".then {word}", "?and for {word}", "?and in {word}"),
    ),
    held_out=("?and with {word}", "!next is {word}", "!do the same to {word}"),
)
SPELL_IT = Ways(
    train=(
        *("!spell it", "!spell it", "!spell (it|that|this)", "!(now|) spell (it|that) (out|)"),
        *("?how is (it|that) spelled", "?how do you spell (it|that)", "?can you spell (it|that)"),
        *("?what are its letters", "!spell that word", "!give me its letters"),
    ),
    held_out=("!write it letter by letter", "?which letters has it", "?could it be spelled"),
)
COUNT_IN_IT = Ways(
    train=(
        *("?how many {letter} (are|) in it", "!count the {letter}", "!count (the|) {letter} in it"),
        *("?how many {letter}", "?how many {letter}'s (are|) in (it|that)", "!now count {letter}"),
        *("?how many {letter} (does|has) it (have|)", "?and how many {letter} (are|) in it"),
    ),
    held_out=("?how often is {letter} in there", "!give me the number of {letter} in it"),
)
AND_LETTER = Ways(
    train=("?and {letter}", "?and how many {letter}", "?what about {letter}", "!now {letter}"),
    held_out=("?and with {letter}", "?how about {letter}"),
)
CALCULATE_ON = Ways(
    train=(
        *("?and {sign} {n}", "!{sign} {n}", "?(now|then) {sign} {n}", "?and {sign} {n}"),
        *("?what is that {sign} {n}", "?and that {sign} {n}", "?what (is|about) it {sign} {n}"),
    ),
    held_out=("?how much is that {sign} {n}", "!take that {sign} {n}"),
)
MORE = Ways(
    train=(
        *("!tell me more", "!go on", "!more", "!continue", "?and then", "?what else", "!say more"),
        *("!another one", "!more about (it|that|this)", "?what happened (then|next)", "!one more"),
        *("?(is there|anything|something) more", "?and", "!tell me another"),
    ),
    held_out=("!carry on", "!keep going", "?what came after that"),
)
AND_SUBJECT = Ways(
    train=(
        "?and {subject}",
        "?what about {subject}",
        "?and about {subject}",
        "?how about {subject}",
    ),
    held_out=("?and for {subject}", "!now something of {subject}"),
)
SIGNS = {"plus": "+", "+": "+", "minus": "-", "-": "-", "times": "*", "x": "*", "*": "*"}
CLOSING = ("thanks", "thanks", "praise", "bye", "limits", "who", "blame")
"""Intents that often come after an answer."""


class FollowUps(Task):
    """Conversations of several turns.

    Row i of a split is a pure function of (corpus_texts, words, identity, seed, split, i).
    """

    VAL_BY_CONTENT = True

    def __init__(
        self,
        split: str,
        size: int | None = None,
        corpus_texts: Sequence[str] | None = None,
        words: Sequence[str] | None = None,
        identity: str | Path = INTENTS,
        seed: int = 0,
    ):
        super().__init__("followups", split)
        self.size = check_generated("followups", split, size)
        self.seed = seed
        self.texts = tuple(known_texts() if corpus_texts is None else corpus_texts)
        self.index = index_of(self.texts, split)
        self.unheard = unheard(self.texts, split)
        self.words = words_of(load_words(words), split)
        if not self.index.openings or not self.words:
            raise UserError(f"followups: no text or no word belongs to the split {split}")
        self.intents = {intent.name: intent for intent in read_intents(str(identity))}

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        made_from = [digest("\n".join(self.texts)), self.words, self.intents]
        return {"size": self.size, "seed": self.seed, "made_from": digest(repr(made_from))}

    def row(self, index: int) -> Conversation:
        random = row_random("followups", self.split, self.seed, index)
        question, answer, check = self.opening(random)
        messages: list[dict[str, Any]] = []
        for turn in range(random.choice((2, 2, 3, 4))):
            if turn:
                question, answer, check = self.next(random, check)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages, "check": check}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if the last answer is right."""
        return judge(conversation["check"], completion, pairs_of(self.texts))

    def opening(self, random: Random) -> tuple[str, Content, Check]:
        """Draw (question, answer, check) of a turn that needs no turn before it."""
        kind = random.choice(("spell", "count", "sum", "passage", "unknown", "hello"))
        if kind == "spell":
            return self.spelling(random.choice(self.words), random)
        if kind == "count":
            word = random.choice(self.words)
            letter = random.choice(word)
            values = {"word": quoted(word, random, self.split), "plain": word, "letter": letter}
            question = ask(random, self.split, COUNTING, values)
            return _answered(question, {"count": word, "letter": letter})
        if kind == "sum":
            shape, said, call = draw_sum(random, self.split)
            return _answered(ask_sum(random, self.split, shape, said), {"sum": call})
        if kind == "passage":
            return draw_passage(self.index, random, self.split)
        if kind == "unknown":
            question, answer = draw_unknown(self.unheard, self.words, random, self.split)
            return question, answer, {"unknown": question}
        return self.intent(random.choice(("hello", "how", "abilities")), random)

    def next(self, random: Random, check: Check) -> tuple[str, Content, Check]:
        """Draw a turn that follows one with this check."""
        kind = random.random()
        if kind < 0.15:
            return self.intent(random.choice(CLOSING), random)
        if kind < 0.28:
            return self.opening(random)
        if "spell" in check or "count" in check:
            return self.after_word(random, check)
        if "sum" in check:
            said = random.choice(list(SIGNS))
            before, n = calculate(check["sum"]), draw_number(random, 1)
            call = f"{before}{SIGNS[said]}{n}"
            if before.lstrip("-").isdecimal() and split_of(call) == self.split:
                question = ask(random, self.split, CALCULATE_ON, {"sign": said, "n": str(n)})
                return _answered(question, {"sum": call})
        if "about" in check or "continue" in check:
            return self.after_passage(random, check)
        if "unknown" in check and self.unheard and random.random() < 0.5:
            topic = random.choice(list(self.unheard))
            question = ask(
                random, self.split, AND_SUBJECT, {"subject": random.choice(self.unheard[topic])}
            )
            return question, draw_answer(random), {"unknown": question}
        return self.opening(random)

    def spelling(self, word: str, random: Random) -> tuple[str, Content, Check]:
        shown = quoted(word, random, self.split)
        question = ask(random, self.split, SPELLING, {"word": shown, "plain": word})
        return _answered(question, {"spell": [word]})

    def after_word(self, random: Random, check: Check) -> tuple[str, Content, Check]:
        """Ask for the same of another word, for another letter of it, or for its letters."""
        word = check["count"] if "count" in check else check["spell"][-1]
        kind = random.random()
        if kind < 0.45:
            other = random.choice(self.words)
            question = ask(
                random, self.split, AND_WORD, {"word": quoted(other, random, self.split)}
            )
            new: Check = {"spell": [other]}
            if "count" in check:
                new = {"count": other, "letter": check["letter"]}
            return _answered(question, new)
        if "count" in check and kind < 0.7:
            return _answered(ask(random, self.split, SPELL_IT), {"spell": [word]})
        ways = AND_LETTER if "count" in check and random.random() < 0.5 else COUNT_IN_IT
        letter = random.choice(word) if random.random() < 0.85 else random.choice("aeinorst")
        question = ask(random, self.split, ways, {"letter": letter})
        return _answered(question, {"count": word, "letter": letter})

    def after_passage(self, random: Random, check: Check) -> tuple[str, Content, Check]:
        """Ask for more about the subject, for another subject, or for its letters."""
        subject, kind = check.get("about"), random.random()
        if subject and subject.islower() and words_of([subject], self.split) and kind < 0.2:
            return _answered(ask(random, self.split, SPELL_IT), {"spell": [subject]})
        if subject and kind < 0.6:
            question = ask(random, self.split, MORE)
            return question, self.index.passage(subject, random), {"about": subject}
        subjects = self.index.names[:80] + self.index.nouns[:120]
        if not subjects:
            return self.opening(random)
        other = random.choice(subjects)
        question = ask(random, self.split, AND_SUBJECT, {"subject": other})
        return question, self.index.passage(other, random), {"about": other}

    def intent(self, name: str, random: Random) -> tuple[str, Content, Check]:
        """Draw small talk; a user's own file may lack this intent."""
        intent = self.intents.get(name) or random.choice(list(self.intents.values()))
        answer = random.choice(intent.answers)
        return ask_intent(intent, random, self.split), answer, {"says": list(intent.answers)}


def _answered(question: str, check: Check) -> tuple[str, Content, Check]:
    return question, reference(check), check


if __name__ == "__main__":
    from tasks.specs import main

    main("size", followups=FollowUps)
