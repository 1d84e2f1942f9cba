"""Words and their letters: which words may be shown in training, spelling, counting letters with the tool.

Two thirds of the words that training counts letters in do not exist, so that what is learned is to copy any
word: syllables put together, or pieces of several words, which have the tokens of real words. The others are
all words of the corpus, so that no token is rare.
The words of the list "new" belong to the held-out sets alone.
"""

from __future__ import annotations

import re
from functools import cache

from nanochat.corpus.grammar import data_lines, grammar
from nanochat.corpus.rng import Rng

STARTS = (*"bcdfghklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "sl", "st", "th", "tr", "qu")
VOWELS = (*"aaeeiioou", "ai", "ea", "ee", "oo", "ou", "y")
ENDS = (
    *("", "", "", "n", "r", "s", "l", "t", "m", "d", "ck", "ll", "ng", "nt", "rt", "ss", "st", "x", "p"),
    *("tt", "mm", "bble", "tion", "ry", "ther", "ing", "er"),
)
TEXTS = ("facts.txt", "stories.txt", "chats.txt", "numbers.txt")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@cache
def training_words() -> tuple[str, ...]:
    """Real words whose letters training shows, sorted."""
    lists = grammar("words.txt").lists
    words = {
        w.lower() for name, lines in lists.items() if name != "new" for line in lines for w in line.split()
    }
    return tuple(sorted(words - set(held_out_words())))


@cache
def held_out_words() -> tuple[str, ...]:
    """Words that training never shows, in the order of the file."""
    return tuple(w for line in grammar("words.txt").lists["new"] for w in line.split())


@cache
def corpus_words() -> tuple[str, ...]:
    """training_words and every other word of 4 to 14 letters in the texts of the corpus, sorted."""
    texts = (re.sub(r"\{[^{}]*\}", " ", "\n".join(data_lines(name))) for name in TEXTS)
    words = {w for text in texts for w in re.findall(r"(?<![a-z])[a-z]{4,14}(?![a-z])", text.lower())}
    return tuple(sorted((words - set(held_out_words())).union(training_words())))


def kind_words(kind: str) -> list[str]:
    return grammar("words.txt").lists[f"kind.{kind}"][0].split()


@cache
def kinds() -> tuple[str, ...]:
    """Names of the word kinds: animal, fruit, colour ..."""
    return tuple(name[5:] for name in grammar("words.txt").lists if name.startswith("kind."))


def invented(rng: Rng) -> str:
    """A word that does not exist, of two to four syllables."""
    while True:
        word = "".join(
            rng.pick(STARTS) + rng.pick(VOWELS) for _ in range(rng.pick((2, 2, 3, 3, 4)))
        ) + rng.pick(ENDS)
        if word not in held_out_words():
            return word


def blended(rng: Rng) -> str:
    """The beginning of a word and the end of another one, of 4 to 14 letters; at times a piece between."""
    while True:
        first, middle, last = (rng.pick(corpus_words()) for _ in range(3))
        word = first[: rng.between(1, len(first))]
        if rng.chance(30):
            start = rng.below(len(middle) - 1)
            word += middle[start : start + rng.between(2, 5)]
        word += last[rng.below(len(last)) :]
        if 4 <= len(word) <= 14 and word not in held_out_words():
            return word


def any_word(rng: Rng) -> str:
    """A word of the corpus, a blended one or an invented one."""
    return rng.pick((lambda rng: rng.pick(corpus_words()), blended, invented))(rng)


def draw_letter(rng: Rng, word: str) -> str:
    """Most often a letter of the word, and often one that it has several times."""
    repeated = [c for c in ALPHABET if word.count(c) > 1]
    if repeated and rng.chance(40):
        return rng.pick(repeated)
    return rng.pick(word) if rng.chance(85) else rng.pick(ALPHABET)


def expression(word: str, letter: str) -> str:
    """The tool call. The brackets make the tokenizer split the quoted word as it does in the question."""
    return f"('{word}').count('{letter}')"


def counted(letter: str, count: int) -> str:
    return f"The letter {letter} appears {count} time{'' if count == 1 else 's'}."


def count_question(rng: Rng, word: str, letter: str, *, held_out: bool = False) -> str:
    g = grammar("numbers.txt")
    return g.fill(rng.pick(g.lists["new.letters" if held_out else "letters"]), rng, {"w": word, "l": letter})


def spelled(word: str) -> str:
    return "-".join(word)


def document(rng: Rng) -> str:
    """Some words with their letters."""
    lines = []
    for _ in range(rng.between(3, 6)):
        word = any_word(rng)
        letter = draw_letter(rng, word)
        ways = (
            f"The word '{word}' is spelled {spelled(word)}. It has {len(word)} letters.",
            f"{spelled(word)}: these are the letters of '{word}'.",
            f"The word '{word}' begins with the letter '{word[0]}' and ends with the letter '{word[-1]}'.",
            f"How many '{letter}' are in '{word}'? {expression(word, letter)} = {word.count(letter)}. "
            + counted(letter, word.count(letter)),
            f"{count_question(rng, word, letter)} {expression(word, letter)} = {word.count(letter)}",
        )
        lines.append(rng.pick(ways))
    return "\n".join(lines)
