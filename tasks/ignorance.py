"""Ignorance: questions that a small model cannot answer, and honest answers to them.

    What is the capital of France?   > I do not know that. I can spell words, count letters, ...

Subjects are not in the corpus: those of the lists below with a word that the corpus lacks, and
made-up names. The questions resemble ones that the model can answer (*Who was Moses?* and *Who was
Napoleon?*, *Spell stone.* and *What rhymes with stone?*, *17 times 3* and *17 miles in feet*). The
model therefore learns to tell what it can answer from what it cannot. A subject's hash decides its
split.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

from nanochat.errors import UserError
from tasks.asking import Ways, ask
from tasks.common import Conversation, Task, check_generated, digest, row_random, split_of
from tasks.judges import judge
from tasks.passages import known_texts, telling
from tasks.spellingbee import load_words, words_of

# fmt: off
SUBJECTS: dict[str, tuple[str, ...]] = {
    "place": (
        "France", "Germany", "Japan", "China", "Brazil", "Canada", "Australia", "Norway", "Mexico",
        "Poland", "Finland", "Argentina", "Kenya", "Peru", "Chile", "Portugal", "Ireland", "Russia",
        "Vietnam", "Thailand", "Iceland", "Denmark", "Sweden", "Ukraine", "Cuba", "Nepal", "Texas",
        "Paris", "London", "New York", "Tokyo", "Berlin", "Madrid", "Sydney", "Chicago", "Moscow",
        "Amsterdam", "California", "Vienna", "Prague", "Boston", "Toronto", "Dublin", "Mumbai",
        "Africa", "Europe", "America", "Antarctica", "Mars", "Jupiter", "Scotland", "Belgium",
    ),
    "person": (
        "Napoleon", "Einstein", "Shakespeare", "Obama", "Beethoven", "Mozart", "Picasso", "Newton",
        "Churchill", "Gandhi", "Elvis", "Madonna", "Messi", "Ronaldo", "Taylor Swift", "Darwin",
        "Marie Curie", "Lincoln", "Washington", "Mandela", "Columbus", "Galileo", "Tesla", "Lenin",
        "Harry Potter", "Sherlock Holmes", "Batman", "Bill Gates", "Steve Jobs", "Elon Musk",
        "Rembrandt", "Aristotle", "Plato", "Kant", "Freud", "Stalin", "Marilyn Monroe", "Hamlet",
    ),
    "thing": (
        "telephone", "computer", "car", "airplane", "bicycle", "television", "radio", "internet",
        "engine", "camera", "laptop", "rocket", "battery", "robot", "microscope", "submarine",
        "refrigerator", "keyboard", "printer", "steam engine", "light bulb", "washing machine",
        "telescope", "motorcycle", "smartphone", "vaccine", "piano", "guitar", "helicopter",
    ),
    "topic": (
        "quantum physics", "photosynthesis", "democracy", "inflation", "gravity", "evolution",
        "calculus", "algebra", "the stock market", "bitcoin", "climate change", "black holes",
        "electricity", "chemistry", "football", "basketball", "chess", "tennis", "jazz", "yoga",
        "machine learning", "neural networks", "programming", "Python", "JavaScript", "Linux",
        "economics", "psychology", "dinosaurs", "vitamins", "viruses", "DNA", "atoms", "tax law",
        "the French Revolution", "the Second World War", "the Cold War", "the Olympics",
    ),
    "dish": (
        "pizza", "pasta", "sushi", "pancakes", "chocolate cake", "curry", "hamburgers", "omelettes",
        "apple pie", "spaghetti", "tacos", "risotto", "lasagna", "cookies", "potato soup", "coffee",
    ),
    "work": (
        "a poem", "a song", "an essay", "an email", "a letter to my boss", "some code", "a tweet",
        "a Python program", "a haiku", "a cover letter", "a joke", "a blog post", "a business plan",
    ),
    "language": (
        "French", "German", "Spanish", "Italian", "Chinese", "Japanese", "Russian", "Dutch",
        "Portuguese", "Swedish", "Korean", "Turkish", "Polish", "Danish", "Hindi", "Arabic",
    ),
    "animal": (
        "kangaroo", "giraffe", "penguin", "spider", "octopus", "dolphin", "crocodile", "butterfly",
        "elephant", "whale", "tiger", "gorilla", "hamster", "squirrel", "mosquito",
        "koala", "panda", "leopard", "zebra",
    ),
}
_PERSON_PARTS = (
    ("Mr", "Mrs", "Doctor", "Captain", "Lady", "Sir", "Aunt", "Uncle", "Professor", "President"),
    ("Quill", "Brad", "Whit", "Har", "Stan", "Wood", "Black", "Mil", "Ken", "Fitz", "Mac", "Ash",
     "Green", "Holm", "John", "Rob", "Hul", "Van", "Schu", "Kow", "Gar", "Pet", "Nor", "Tor"),
    ("ford", "ley", "more", "field", "wood", "man", "son", "ton", "ski", "berg", "well", "worth",
     "gate", "ster", "bert", "mann", "croft", "ina", "ello", "ez", "ov"),
)
# fmt: on
QUESTIONS: dict[str, Ways] = {
    "place": Ways(
        train=(
            *telling("{place}"),
            "?what('s| is) the (capital|population|flag|size|currency) of {place}",
            *("?(what|which) city is the capital of {place}", ".capital of {place}"),
            *(
                "?how many people (live|are) in {place}",
                "?who is the (president|leader) of {place}",
            ),
            *("?how far is {place}", "?how (big|old|cold|warm|large) is {place}"),
            *("?where is {place}", "!tell me (something|) about {place}", "?what is {place}"),
            *("?what('s| is) the weather (like|) in {place}", ".weather in {place}"),
            *("?how do i get to {place}", "?what language do they speak in {place}"),
            *("?what (do|can) you (know|tell me) about {place}", "?have you been to {place}"),
            *("?what time is it in {place}", "?who won the war in {place}", ".{place}"),
        ),
        held_out=(
            *("?which (river|sea) is near {place}", "?can you name the capital of {place}"),
            *("?what is {place} known for", "!describe {place}", "?when was {place} founded"),
        ),
    ),
    "person": Ways(
        train=(
            *telling("{person}"),
            *("?who (is|was) {person}", "?who (is|was) {person}", "?whos {person}", ".{person}"),
            *("?who (is|was) {person} and what did (he|she) do", "?what is {person} known for"),
            *("?(can you tell me|do you know) who {person} (is|was)", "!explain who {person} was"),
            *("!tell me (something|more|) about {person}", "?when was {person} born"),
            *(
                "?how old is {person}",
                "?where (was|is) {person} (born|from|)",
                "?who killed {person}",
            ),
            *("?what did {person} (do|say|write|invent)", "?what (do|can) you know about {person}"),
            *("!tell me a story about {person}", "?is {person} (alive|dead|famous|rich)"),
        ),
        held_out=(
            *("?what is {person} famous for", "?do you know {person}", "!describe {person}"),
            *("?what have you read about {person}", "?when did {person} die"),
        ),
    ),
    "thing": Ways(
        train=(
            *telling("(a|the) {thing}"),
            *("?who (invented|made|built) the {thing}", "?how does a {thing} work"),
            *("?when was the {thing} invented", "?how do i (fix|build|use|buy) a {thing}"),
            *(
                "?what is a {thing}",
                "!explain (how|) a {thing} (works|)",
                "?what does a {thing} cost",
            ),
            *("!tell me about the {thing}", "?which {thing} is (the best|best)", ".best {thing}"),
        ),
        held_out=(
            *("?what was the first {thing} like", "?is a {thing} dangerous", "!sell me a {thing}"),
            *("?who came up with the {thing}", "?what is inside a {thing}"),
        ),
    ),
    "topic": Ways(
        train=(
            *telling("{topic}"),
            *("?what is {topic}", "!explain {topic} (to me|)", "!tell me about {topic}"),
            *("?how does {topic} work", "?why is {topic} important", "!teach me {topic}"),
            *("?what (do|can) you (know|tell me) about {topic}", "?do you (know|like) {topic}"),
            *("?who (invented|discovered|won|started) {topic}", ".{topic}"),
        ),
        held_out=(
            *("!summarize {topic}", "?can you teach me about {topic}", "?how did {topic} begin"),
            *("!give me an overview of {topic}", "?what should i know about {topic}"),
        ),
    ),
    "dish": Ways(
        train=(
            *("?how do (i|you) (make|cook|bake) {dish}", "!give me a recipe for {dish}"),
            *(".recipe for {dish}", "?what is in {dish}", "?where can i (get|buy|eat) {dish}"),
            *("!order {dish} (for me|)", "?do you (like|eat) {dish}"),
        ),
        held_out=("?what do i need for {dish}", "!teach me to cook {dish}"),
    ),
    "work": Ways(
        train=(
            *("!write (me|) {work}", "!write (me|) {work} about {word}", "!make (me|) {work}"),
            *("!help me (to|) write {work}", "!give me {work}", "!tell me {work}"),
        ),
        held_out=("!compose {work}", "!draft {work} for me", "?could i have {work} about {word}"),
    ),
    "language": Ways(
        train=(
            *("!translate {word} (in|)to {language}", "?what is {word} in {language}"),
            *("?how do you say {word} in {language}", "?what does {word} mean in {language}"),
            *("!say {word} in {language}", ".{word} in {language}"),
        ),
        held_out=("?what would {word} be in {language}", "!put {word} into {language}"),
    ),
    "animal": Ways(
        train=(
            *telling("(a|the) {animal}"),
            *("?how many (legs|teeth|eyes) (does|has) a {animal} (have|)", "?what is a {animal}"),
            *("?what does a {animal} eat", "?how (big|old|fast|heavy) is a {animal}"),
            *("?where do {animal}s live", "!tell me (something|) about (a|the) {animal}"),
        ),
        held_out=("?how long does a {animal} live", "?can a {animal} swim", "!describe a {animal}"),
    ),
    "word": Ways(
        train=(
            *(
                "?what rhymes with {word}",
                "?what('s| is) (a synonym|the opposite|the plural) of {word}",
            ),
            *("?what does {word} mean", "!define {word}", "?where does the word {word} come from"),
            *("?is {word} a (noun|verb)", "?who invented the word {word}", ".meaning of {word}"),
            *("!draw (me|) a {word}", "?what colo(u|)r is a {word}", "?what does a {word} cost"),
        ),
        held_out=("!find a rhyme for {word}", "?which word is the opposite of {word}"),
    ),
    "number": Ways(
        train=(
            *("?what is the square root of {n}", "?what is {n} in roman numerals"),
            *("?how many (feet|meters) are {n} (miles|yards)", "?is {n} a prime number"),
            *("!convert {n} (dollars|euros) to (pounds|yen)", "?what happened in (18|19|20){two}"),
            *("?what is {n} in binary", "?who won in (19|20){two}", "?what is the log of {n}"),
            *("?how many (seconds|minutes|hours) are in {n} days", "?how long is {n} km in miles"),
            *("?what is the sine of {n}", ".{n} (miles|pounds|degrees) in (km|kilos|celsius)"),
        ),
        held_out=("?what is the (cube root|cosine) of {n}", "!write {n} in hex"),
    ),
    "now": Ways(
        train=(
            *("?what time is it", "?what('s| is) the (time|date|weather|news) (today|now|)"),
            *("?what day is (it|today)", "?(will it|is it going to) rain (today|tomorrow)"),
            *("?who won (the game|the match|the election) (last night|yesterday|)", ".news"),
            *(
                "?what is (the price of gold|the stock price|the exchange rate) (today|now)",
                "?what year is it",
            ),
            *("?what should i (eat|wear|watch|read|buy|do) (today|tonight|)", ".the time"),
            *(
                "?where (am i|do i live)",
                "?what is my (name|age|address|number)",
                "!play (music|a song)",
            ),
            *(
                "?how old am i",
                "!set an alarm",
                "!call (my mother|a taxi)",
                "!book a (flight|hotel)",
            ),
            *("!recommend (me|) a (book|film|movie|song|restaurant)", "!search the (web|internet)"),
            *(
                "?what is the meaning of life",
                "?how tall is (it|he|mount everest)",
                "!show me a picture",
            ),
        ),
        held_out=(
            *("?how is the weather", "?what did i (eat|say) yesterday", "!order a taxi"),
            *("?which film should i see", "?is the shop open", "?do you have the time"),
        ),
    ),
}  # fmt: skip
SAID = (
    "I do not know that.", "I do not know.", "That I do not know.", "Sorry, I do not know.",
    "I am sorry, I do not know that.", "I do not know, I am a small model.",
    "I know nothing about that.", "That is beyond me.", "I cannot answer that.",
    "I am too small to know that. I do not know.", "I am afraid I cannot say.",
    "My text says nothing of that: I do not know.",
)  # fmt: skip
OFFERED = (
    "I can spell words, count letters and do sums.",
    "I can spell a word, count its letters or do a sum for you.",
    "Ask me to spell a word, to count letters, or for a sum.",
    "What I can do is sums, spelling and counting letters.",
    "I can do sums, spell words, and say what is in my text.",
    "I know the text I was trained on, and I can spell and do sums.",
    "Give me a sum, or a word to spell.",
)
_NOUN = re.compile(r"[^\W\d_]+")


class Ignorance(Task):
    """Questions without an answer; row i is a function of (corpus_texts, words, seed, split, i).

    Subjects in `corpus_texts` are left out, since the model may know them. `words` are those of the
    spelling tasks.
    """

    VAL_BY_CONTENT = True

    def __init__(
        self,
        split: str,
        size: int | None = None,
        corpus_texts: Sequence[str] | None = None,
        words: Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__("ignorance", split)
        self.size = check_generated("ignorance", split, size)
        self.seed = seed
        texts = tuple(known_texts() if corpus_texts is None else corpus_texts)
        self.subjects = unheard(texts, split)
        self.words = words_of(load_words(words), split)
        if not self.words:
            raise UserError(f"ignorance: no word belongs to the split {split}; give more words")

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        held = [self.subjects, self.words]
        return {"size": self.size, "seed": self.seed, "subjects": digest(repr(held))}

    def row(self, index: int) -> Conversation:
        random = row_random("ignorance", self.split, self.seed, index)
        question, answer = draw_unknown(self.subjects, self.words, random, self.split)
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "check": {"unknown": question},
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if the completion says that the model does not know, and what it can do."""
        return judge(conversation["check"], completion)


@lru_cache(maxsize=4)
def unheard(texts: tuple[str, ...], split: str) -> dict[str, list[str]]:
    """Subjects of a split with a word that the texts never use."""
    heard = {word.lower() for text in texts for word in set(_NOUN.findall(text))}

    def strange(subject: str) -> bool:
        return any(word.lower() not in heard for word in _NOUN.findall(subject))

    chosen = {
        kind: [s for s in listed if split_of(s) == split and (strange(s) or kind == "work")]
        for kind, listed in SUBJECTS.items()
    }
    return {kind: listed for kind, listed in chosen.items() if listed}


def draw_unknown(
    subjects: dict[str, list[str]], words: Sequence[str], random: Random, split: str
) -> tuple[str, str]:
    """Draw (question, answer)."""
    kind = random.choice((*subjects, "person", "word", "number", "now", "now"))
    values = {"n": str(random.randint(2, 1000)), "two": f"{random.randint(0, 99):02}"}
    if kind in subjects:
        values[kind] = random.choice(subjects[kind])
    if kind == "person" and (kind not in subjects or random.random() < 0.5):
        values[kind] = made_up_person(random, split)
    values["word"] = random.choice(words)
    question = ask(random, split, QUESTIONS[kind], values)
    return question, draw_answer(random)


def draw_answer(random: Random) -> str:
    """Draw an answer that says that the model does not know, and what it can do."""
    return f"{random.choice(SAID)} {random.choice(OFFERED)}"


def made_up_person(random: Random, split: str) -> str:
    """Make up a name such as `Doctor Whitcroft` or `Kowski`; its hash decides the split."""
    titles, first, second = _PERSON_PARTS
    while True:
        name = random.choice(first) + random.choice(second)
        if split_of(name) == split:
            return f"{random.choice(titles)} {name}" if random.random() < 0.3 else name


if __name__ == "__main__":
    from tasks.specs import main

    main("size", ignorance=Ignorance)
