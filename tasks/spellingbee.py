"""Spelling bee: spelling words and counting their letters, which a model cannot see in tokens.

The model gets pieces of words, not letters, so it must learn the letters of every piece. Words of
the train and test split are disjoint. A held-out word can therefore be spelled only if its *pieces*
were learned from other words. Four choices make that possible:

- **Held-out words are in quotes in most prompts.** In `Spell the word: banished` the word begins
  with a space, and with their space most words are one token (59 % of the embedded corpus's words
  at vocabulary 4096). The letters of a token that was never seen cannot be known. In `"wisdom"`
  there is no space, so the word is cut into pieces that other words share (`w|isdom`; 97 % of
  words). One held-out prompt in twelve still has no quotes, and an unseen token there counts as an
  error. People mostly use no quotes, so most training prompts have none, and only three words of
  a hundred are held out; the model learns whole-word tokens from these prompts.
- **Letters are answered as `b a n i s h e d`.** A space and a letter are one token for most letters
  and two for the others, whatever their neighbours are. `b-a-n` would take two tokens for each
  letter, and a tokenizer may merge parts of `ban` or `b,a,n`.
- **Three of five training rows ask for several words.** This gives more letters per token, since
  most of a single word's conversation is the prompt.
- **A third of the training words are made up**, of the beginning of one training word and the end
  of another (`banthing`, `wiished`) or letter by letter. Pieces then occur in many combinations, so
  that learning their letters is easier than learning words by heart. Only real words are tested.

SpellingBee spells the word, counts its letter, then calls Python, whose output the engine inserts:
the answer is right if the call is. The call holds the word as it was just spelled,
`"b a n i s h e d".count("a")`, in letters that the model has written a thousand times. In
`"banished"` the word's pieces would have to be copied, and copying is learned token by token: a
model that spelled 56 % of held-out words copied only 16 % of them into the call, and replaced
pieces that it had never written by frequent ones. Quotes are double because the split pattern cuts
`'s`, `'t`, `'d`, `'m` off as if they were contractions.
"""

import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from nanochat.data.corpus import Corpus
from nanochat.data.hub import open_corpus
from nanochat.data.order import Permutation, make_key
from nanochat.errors import UserError
from nanochat.paths import atomic_write, base_dir
from tasks.asking import Ways, ask
from tasks.common import (
    Conversation,
    Task,
    check_generated,
    digest,
    final_answer,
    row_random,
    split_of,
)
from tasks.judges import judge, reference, spelled_letters

MIN_LETTERS, MAX_LETTERS = 3, 15
FEWEST_PARTS, MOST_PARTS = 25, 100
"""Words are split into so many parts, two for test and one for val; long lists into the most. A
word that training leaves out is mostly a token of its own, whose letters are in no other row."""
TIMES_ASKED = 4
"""Number of times that each held-out word is asked by default, in other words each time."""
MADE_UP_SHARE = 0.35
LIST_SHARE = 0.6
BARE_SHARE, BARE_SHARE_HELD_OUT = 0.85, 1 / 12
"""Shares of single words without quotes: in the split train, and in the other splits."""
MAX_WORDS = 8

# {word} has quotes of any kind or none, {plain} has none. Some training patterns are whole messages
# that `tasks/asking.py` does not change.
SPELLING = Ways(
    train=(
        *("Spell the word {word}.", "Spell the word: {word}", "Spell {word}.", "Spell {word}"),
        *("spell {word}", "Spell out {word}.", "Please spell {word}.", "Can you spell {word}?"),
        *("Please spell the word {word} for me.", "How do you spell {word}?"),
        *("What are the letters of {word}?", "Which letters are in {word}, in order?"),
        *("Say the letters of {word} one by one.", "Spell this word:\n{plain}"),
        *("Take the word {word} to pieces, letter by letter.", "Spell the word: {plain}"),
        *("!spell {word}", "!spell {word}", "!spell (out|) (the word|) {word}"),
        *("!spell: {word}", "!spell the word {word}", "!spell (this|this word|): {word}"),
        "!(write|type) (out|down|) (the word|) {word} (letter by letter|one letter at a time)",
        "!give me the (letters|spelling) of (the word|) {word}",
        "!tell me (how to spell|the letters of|how you spell|the spelling of) (the word|) {word}",
        "!show me (how to spell|the letters of|the spelling of) (the word|) {word}",
        *("?how (do|would|can) (you|i|we|one) spell (the word|) {word}", "?how to spell {word}"),
        *("?how is (the word|) {word} (spelled|spelt|written)", "?{word}, how is it spelled"),
        "?what are the letters (of|in) (the word|) {word}",
        "?what('s| is) the spelling of (the word|) {word}",
        *("?which letters (are in|has|make up) {word}", "?what letters (does|do) {word} have"),
        *(".(the|) spelling of {word}", ".(the|) letters (of|in) {word}", ".spelling: {word}"),
        *(".{word}, letter by letter", ".{word} spelled (out|)", ".{word} in letters"),
        *("!take {word} apart", "!(break|split|cut) {word} (up|) into (its|) letters"),
        "!(give|list|write|say|tell me|show me|name|type|print) (me|) (the|all the|all) letters "
        "(of|in|that make up|that are in) (the word|) {word}",
        "?(do you know|can you tell me|could you tell me|i want to know|can you say|i wonder) how "
        "(the word|) {word} is (spelled|spelt|written)",
        "!(tell|show|teach) me how {word} is (spelled|spelt|written)",
        "?(can|could|would) you (please|) (spell|write out|take apart) (the word|) {word}",
        "!(write|spell|say|do) {word} (one letter at a time|with spaces|in single letters|slowly)",
        "!(i need|i want|give me) the spelling (of|for) (the word|) {word}",
        *("?spell {word} (for me|) (will you|can you|would you)", ".how to (spell|write) {word}"),
        *(
            ".{word}: (spell it|letters|spelling|how is it spelled)",
            "!spell {word} (again|now|too)",
        ),
        "?(what|which) letters (do i need|are needed|are there) (for|in) (the word|) {word}",
        *("?is it possible to spell {word}", "!separate the letters (of|in) {word}"),
        "!(my word is|the word is|here is a word:) {word}. (spell it|please spell it|its letters)",
        "!i (do not|don't) know how to (spell|write) {word}, (help|help me|can you)",
        "!(say|write|give|show|list|print|put down|recite|read|call out|present|share) (me|us|) "
        "(the|all the|every one of the|the single|the separate|the different) (letters|characters) "
        "(of|in|from|for|inside|that form|making up|which make) (the word|the name|) {word}",
        "!(say|write|read|put|do|type|print|give me|show me) {word} (with a space between|with "
        "spaces between|as|by|as a list of|split into|with all) (the letters|letters|its letters)",
        "?(what|which) (letters|characters) (are in|go into|form|build|are used in|are used for|"
        "belong to|can be found in|occur in|come in|make) (the word|the name|) {word}",
        "?(what|how) (is|was|would be|should be) the (exact|proper|usual|good|real|whole) "
        "(spelling|way to spell|way of spelling) (of|) {word}",
        "?how (can|could|might|must|may|do|would) (we|i|people|they|a child|anyone|he|she) "
        "(spell|write down|put down) (the word|) {word}",
        "!(teach|let|show) (me|us|my son|a child|him|her) (the|how to do the) spelling of {word}",
        "!i (need|want|have|would like|wish|am trying|must) to (spell|write) {word}",
        "!(for|with|take) (the word|) {word}, (say|write|give me|show me|list) (the|its) letters",
        "!{word} is (my word|the word|hard to spell), (spell it|its letters please)",
        ".(next word|new word|word|a word|another): {word}. (spell|spell it|letters)",
    ),
    held_out=(
        "!say {word} letter (for|after) letter",
        *("?what is the (correct|right) spelling for {word}", "!name each letter of {word}"),
        "!go through {word} one letter after the other",
        *("?which letters do (i|you) need to write {word}", ".{word} in single letters"),
        *("!help me (to|) spell {word}", "?how should (i|one) spell {word}"),
        *("!read out the letters of {word}", "?what would {word} be in letters"),
    ),
)
# {words}: separated by commas; {lines}: one per line. Only training rows ask for several words.
LISTS = Ways(
    train=(
        "Spell {words}.",
        "Spell the words {words}.",
        "Spell the words: {words}",
        "How do you spell {words}?",
        "Can you spell {words}?",
        "Please spell {words} for me.",
        "Write {words} letter by letter.",
        "Spell these words:\n{lines}",
        "Spell the words:\n{lines}",
        "How are these words spelled?\n{lines}",
        "!spell (the words|) {words}",
        "?how do you spell {words}",
        ".{words}, letter by letter",
        "!write {words} in letters",
    ),
    held_out=(),
)
# {letter} has quotes or none.
COUNTING = Ways(
    train=(
        *("How many {letter} are in {word}?", "How many {letter} are there in {word}?"),
        *("How many {letter} are in the word {word}?", "How many {letter} does {word} have?"),
        *("How many {letter}'s are in {word}?", "how many {letter} in {word}"),
        "How many times does the letter {letter} appear in {word}?",
        "How many times is {letter} used in the word {word}?",
        *("How often is there a {letter} in {word}?", "Count the {letter} in {word}."),
        *("Count the letter {letter} in {word}.", "Please count the {letter}'s in {word}."),
        *("The word is {word}. How many {letter} has it?", "How many {letter} are in {plain}?"),
        *("Count how many times {letter} is in the word {word}.", "Count the {letter} in {plain}."),
        *("?how many {letter} (are|) (there|) in {word}", "?how many {letter} (are|) in {word}"),
        "?how many {letter}('s|s) (are|) (there|) in (the word|) {word}",
        "?how many (letters|letter|times) {letter} (are|is|) in (the word|) {word}",
        "?how many times (does|do) (the letter|) {letter} (appear|occur|come|come up) in {word}",
        "?how often (does|do) (the letter|) {letter} (appear|occur|come|come up) in {word}",
        *("?how often is {letter} in (the word|) {word}", "?how many {letter} (has|does) {word}"),
        "!count (all|) (the|) (letter|letters|) {letter} in (the word|) {word}",
        "!count (the|) {letter}'s in (the word|) {word}",
        "!tell me how many {letter} (are|there are|) in (the word|) {word}",
        "?what('s| is) the (number|count) of {letter} in (the word|) {word}",
        *(".(the|) number of {letter} in {word}", ".(letter|) {letter} in {word}, how many"),
        *(".(letter|) count of {letter} in {word}", ".how many {letter} in {word}"),
        *("?in {word}, how many {letter} are there", "!give me the number of {letter} in {word}"),
        "?(does|has) {word} (have|) {letter} and how (many|often)",
        "!(give|tell|show) me the (number|count) of (letters|) {letter} in (the word|) {word}",
        "?how many (times|) (do you see|can you see|can you find|do you find|are we using|do i "
        "need) (the letter|letter|) {letter} (in|for) (the word|) {word}",
        "?(do you know|can you tell me|i want to know|i wonder|can you say) how many "
        "{letter}('s|s|) (are|there are|are there) in (the word|) {word}",
        *("!(find|count|number) (all|every|each|the) {letter} in (the word|) {word}",),
        *("?{word}: how (many|often) {letter}('s|s|)", "?{word} has how many {letter}('s|s|)"),
        *("?in (the word|) {word} how many {letter}('s|s|) (are there|do you see|)",),
        "!(say|tell me|find out) how (often|many times) {letter} (is|comes up|occurs) in {word}",
        "!count how (many|often) {letter} (are|is|there are) in {word}",
        "?how many of (the letter|) {letter} (are|is) in {word}",
        ".{letter} (count|) in {word}",
        "?how (many times|often) (is|can|does|do|will|did) (the|) (letter|character|) {letter} "
        "(be found|appear|show up|exist|stand|turn up|seen|used|present|written) "
        "(in|inside|within|of) (the word|the term|) {word}",
        "!(number|tally|add up|check|work out|figure out|determine|calculate) "
        "(how many|all|the|each) (letter|) {letter}('s|s|) (in|of|inside|within|are in) {word}",
        "?what (is|was|would be|are) the (count|total|full number|tally) (of|for) "
        "(letter|the letter|) {letter} (in|of|within|inside) (the word|) {word}",
        "?(if|when) (i|you|we) (spell|write|look at|read) {word}, how (many|often) "
        "{letter}('s|s|) (are there|do i see|come|do we need)",
        "!(for|with|take) (the word|) {word}, (say|tell me|count|give me) "
        "(how many|the number of) {letter}",
    ),
    held_out=(
        "?how many of the letters (in|of) {word} are {letter}",
        "?can you say how many {letter} {word} (has|contains)",
        *(".{word} is the word, how many {letter}", "?what number of {letter} does {word} contain"),
        *("!find (all|every) {letter} in {word} and count them", ".amount of {letter} in {word}"),
        *("!go through {word} and count {letter}", ".total of {letter} in {word}"),
        *("?how frequently does {letter} occur in {word}", "!give the count of {letter} in {word}"),
    ),
)


class _WordTask(Task):
    """Prompts about words; row i of a split is a pure function of (words, seed, split, i).

    `words`: a .txt file with a word per line, a .zip with such a file, the words themselves, or
    None for those of the embedded corpus (`corpus_options` gives those of the corpus that the
    tokenizer was used on). A split goes through its words in a keyed order, which is another one in
    each pass.
    """

    NAME: ClassVar[str]
    VAL_BY_CONTENT = True

    def __init__(
        self,
        split: str,
        size: int | None = None,
        words: str | Path | Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__(self.NAME, split)
        self.seed = seed
        all_words = load_words(words)
        self.words = words_of(all_words, split)
        self.held_out = set(all_words).difference(self.words) if split == "train" else set()
        if not self.words:
            raise UserError(
                f"{self.NAME}: none of {len(all_words)} words belongs to the split {split}; "
                "give a list of a few hundred words at least"
            )
        self.size = check_generated(self.NAME, split, size)
        if size is None and split != "train":
            self.size = min(self.size, TIMES_ASKED * len(self.words))

    def __len__(self) -> int:
        return self.size

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "words": digest("\n".join(self.words))}

    def random(self, index: int) -> Random:
        return row_random(self.name, self.split, self.seed, index)

    def word(self, index: int, random: Random) -> str:
        """Return the next word in the order, or, in the train split, sometimes a made-up one."""
        if self.split == "train" and random.random() < MADE_UP_SHARE:
            return made_up_word(self.words, self.held_out, random)
        turn, place = divmod(index, len(self.words))
        return self.words[Permutation(len(self.words), make_key(self.seed, turn))[place]]


class SimpleSpelling(_WordTask):
    """Spelling: `Spell the word "banished".` -> `b a n i s h e d`; several words, a line each."""

    NAME = "simplespelling"

    def row(self, index: int) -> Conversation:
        random = self.random(index)
        words = [self.word(index, random)]
        if self.split == "train" and random.random() < LIST_SHARE:
            for _ in range(random.randint(1, MAX_WORDS - 1)):
                words.append(self.word(random.randrange(len(self.words)), random))
        prompt = _spelling_prompt(words, random, self.split)
        return {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": "\n".join(" ".join(word) for word in words)},
            ],
            "words": words,
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if each line has a word's letters, one by one; separators and case do not matter."""
        return judge({"spell": conversation["words"]}, completion)

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        lines = spelled_letters(completion)
        return len(lines) == len(conversation["words"]) and all(
            len(letter) == 1 for line in lines for letter in line
        )


class SpellingBee(_WordTask):
    """Counting: `How many "r" are in "strawberry"?` -> spelled, counted, checked, `#### 3`."""

    NAME = "spellingbee"

    def row(self, index: int) -> Conversation:
        random = self.random(index)
        word = self.word(index, random)
        letter = self.letter(word, random)
        style = random.random()
        shown = f'"{letter}"' if style < 0.3 else f"'{letter}'" if style < 0.4 else letter
        values = {"word": quoted(word, random, self.split), "plain": word, "letter": shown}
        return {
            "messages": [
                {"role": "user", "content": ask(random, self.split, COUNTING, values)},
                {"role": "assistant", "content": reference({"count": word, "letter": letter})},
            ],
            "word": word,
            "letter": letter,
            "answer": str(word.count(letter)),
        }

    def letter(self, word: str, random: Random) -> str:
        """Draw a letter, mostly the word's most frequent one.

        Three in four random letters occur just once, and the answer "1" would be right 73 times in
        100. With this choice it is right 47 times.
        """
        kind = random.random()
        if kind < 0.2:  # a letter of another word, which this one mostly lacks
            return random.choice(random.choice(self.words))
        if kind < 0.35:
            return random.choice(word)
        most = max(word.count(letter) for letter in word)
        return random.choice([letter for letter in word if word.count(letter) == most])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """True if the spelling, the counting and the number are right."""
        check = {"count": conversation["word"], "letter": conversation["letter"]}
        return judge(check, completion)

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        return final_answer(completion) is not None

    def vote(self, conversation: Conversation, completion: str) -> Fraction | None:
        return final_answer(completion)


def words_of(words: Sequence[str], split: str) -> list[str]:
    """The words of a split; which words are held out depends on the length of the list too."""
    parts = min(max(len(words) // 12, FEWEST_PARTS), MOST_PARTS)
    return [word for word in words if split_of(word, parts) == split]


def made_up_word(words: Sequence[str], held_out: Collection[str], random: Random) -> str:
    """A word of 3 to 15 letters that looks like these and is none of those held out.

    Half are the beginning of one word and the end of another. The others are drawn letter by
    letter, each after the two before it, and have pieces that no word of a small corpus has.
    """
    while True:
        if random.random() < 0.5:
            first, second = random.choice(words), random.choice(words)
            word = first[: random.randint(1, len(first))] + second[random.randrange(len(second)) :]
        else:
            after, word = _letters_after(tuple(words)), "  "
            while len(word) < MAX_LETTERS + 2 and not word.endswith(" ", 2):
                word += random.choice(after[word[-2:]])
            word = word.strip()
        if MIN_LETTERS <= len(word) <= MAX_LETTERS and word not in held_out:
            return word


@lru_cache(maxsize=4)
def _letters_after(words: tuple[str, ...]) -> dict[str, str]:
    """Two letters -> those that follow them, as often as they do; a space stands for the end."""
    found: dict[str, list[str]] = defaultdict(list)
    for word in words:
        padded = f"  {word} "
        for i in range(len(word) + 1):
            found[padded[i : i + 2]].append(padded[i + 2])
    return {two: "".join(letters) for two, letters in found.items()}


def _spelling_prompt(words: list[str], random: Random, split: str) -> str:
    if len(words) == 1:
        values = {"word": quoted(words[0], random, split), "plain": words[0]}
        return ask(random, split, SPELLING, values)
    shown = [quoted(word, random, split) for word in words]
    if random.random() < BARE_SHARE:
        shown = words
    comma_list = ", ".join(shown[:-1]) + " and " + shown[-1]
    return ask(random, split, LISTS, {"words": comma_list, "lines": "\n".join(words)})


def quoted(word: str, random: Random, split: str = "train") -> str:
    """Write a word in quotes, or without them and then sometimes with capitals."""
    bare = random.random() < (BARE_SHARE if split == "train" else BARE_SHARE_HELD_OUT)
    style = random.random()
    if bare:
        return word.capitalize() if style < 0.2 else word.upper() if style < 0.25 else word
    if style < 0.62:
        return f'"{word}"'
    return (
        f"'{word}'"
        if style < 0.92
        else f"\N{LEFT DOUBLE QUOTATION MARK}{word}\N{RIGHT DOUBLE QUOTATION MARK}"
    )


# Word lists


def words_path(tokenizer_hash: str | None = None) -> Path:
    """Path of the words of the corpus that a tokenizer was used on; None: the embedded corpus."""
    return base_dir() / "words" / f"{tokenizer_hash[:16] if tokenizer_hash else 'bbe'}.txt"


def usable(word: str) -> bool:
    return MIN_LETTERS <= len(word) <= MAX_LETTERS and word.isalpha() and word.islower()


def corpus_words(documents: Iterable[str], max_characters: int = 100_000_000) -> list[str]:
    """List the words that occur at least twice in lower case (names do not), sorted.

    Only the first `max_characters` characters are read, which have enough words.
    """
    counts: Counter[str] = Counter()
    read = 0
    for text in documents:
        # The parts of "don't" and "o'clock" are left out.
        counts.update(re.findall(r"(?<![\w'’])[^\W\d_]+(?![\w'’])", text))
        read += len(text)
        if read >= max_characters:
            break
    return sorted(word for word, count in counts.items() if count >= 2 and usable(word))


_HEADER = re.compile(r"# words of the corpus (.+), digest ([0-9a-f]{32})\n")
"""First line of a noted list: the corpus, and the digest of its name and of all words."""


def noted_words(tokenizer_hash: str) -> Path | None:
    """Path of the list that a stage noted for this tokenizer, or None."""
    path = words_path(tokenizer_hash)
    return path if path.is_file() else None


def noted_corpus(tokenizer_hash: str) -> str | None:
    """Name of the corpus whose words were noted for this tokenizer, or None."""
    path = noted_words(tokenizer_hash)
    return _noted(path)[0] if path else None


def write_words(corpus: Corpus, tokenizer_hash: str | None = None) -> Path:
    """Write the list of this corpus's words for the tokenizer; returns its path."""
    words = corpus_words(corpus.documents("train"))
    if not words:
        raise UserError(f"corpus {corpus.name}: no lower-case word occurs twice in its train split")
    text = "".join(f"{word}\n" for word in words)
    path = words_path(tokenizer_hash)
    first = f"# words of the corpus {corpus.name}, digest {digest(corpus.name + text)}\n"
    atomic_write(path, first + text)
    return path


def _noted(path: Path) -> tuple[str, str]:
    """Read (corpus, words) of a noted list; UserError if it was changed since."""
    text = path.read_bytes().decode("utf-8", "replace")
    header = _HEADER.match(text)
    words = text[header.end() :] if header else ""
    if not header or digest(header[1] + words) != header[2]:
        raise UserError(
            f"{path} was changed after it was written: its digest is not the recorded one; delete "
            "it, and mid_train or chat_sft writes it again"
        )
    return header[1], words


def load_words(source: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Load the usable words of a list (see `_WordTask`), sorted, each once."""
    if source is None:
        path = words_path() if words_path().is_file() else write_words(open_corpus("bbe"))
    elif isinstance(source, str | Path):
        path = Path(source).expanduser()
    else:
        return _chosen(source, "the given words")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a .txt with a word per line, or a .zip of it")
    return _read_words(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_words(path: Path, modified: int) -> tuple[str, ...]:
    """Read words; cached by `modified`, as each split of each task reads up to 370,000 words."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if name.endswith(".txt")]
                if len(members) != 1:
                    raise UserError(f"{path} holds {len(members)} .txt files, expected one")
                text = archive.read(members[0]).decode()
        elif path.parent == words_path().parent:
            text = _noted(path)[1]
        else:
            text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no word list: {error}; expected UTF-8 text") from error
    lines = [line.strip() for line in text.splitlines()]
    return _chosen([line for line in lines if not line.startswith("#")], str(path))


def _chosen(words: Iterable[str], where: str) -> tuple[str, ...]:
    chosen = tuple(sorted({word for word in words if usable(word)}))
    if not chosen:
        raise UserError(
            f"{where} has no usable word: lower-case letters only, "
            f"{MIN_LETTERS} to {MAX_LETTERS} of them, one word per line"
        )
    return chosen


if __name__ == "__main__":
    from tasks.specs import main

    main("size", simplespelling=SimpleSpelling, spellingbee=SpellingBee)
