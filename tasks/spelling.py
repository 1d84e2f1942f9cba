"""SimpleSpelling and SpellingBee: words letter by letter, and counting a letter by hand and with the tool.

Example `i` of the training split is drawn with seed i, of the test split with seed 10,000,000 + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanochat.chat_format import text_of
from nanochat.corpus.chats import tool_answer
from nanochat.corpus.rng import Rng
from tasks.base import Conversation, Task
from tasks.gsm8k import final_answer

TEST_SEED = 10_000_000
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ASKED = (
    "How many {l} are in the word {w}",
    "How many {l} are in {w}",
    "How many {l}'s does {w} have",
    "Count the letter {l} in {w}",
    "Count how many times {l} appears in {w}",
    "How often does {l} occur in the word {w}",
    "In the word {w}, how many {l} are there",
    "Number of {l} in {w}",
    "Please count {l} in {w}",
    "What is the count of {l} in {w}",
    "can you tell me how many {l} there are in {w}",
    "I wonder how many {l} the word {w} has",
    "Wie viele {l} sind in {w}",
    "Wie oft kommt {l} im Wort {w} vor",
    "Combien de {l} y a-t-il dans {w}",
    "Compte les {l} dans le mot {w}",
    "¿Cuántas {l} hay en {w}",
    "¿Cuántas veces aparece {l} en la palabra {w}",
    "Quante {l} ci sono in {w}",
    "Quantas vezes aparece {l} em {w}",
    "Hoeveel {l} zitten er in {w}",
    "Ile razy litera {l} występuje w słowie {w}",
    "Hur många {l} finns det i {w}",
    "Сколько букв {l} в слове {w}",
    "{w} 里有几个 {l}",
    "{w} に {l} はいくつありますか",
    "{w}에 {l}이 몇 개 있나요",
)
MARKS = ("?", "?", "", ".")
QUOTES = ("", "'", "'", '"')


class SimpleSpelling(Task):
    """ "Spell the word: cat" -> "cat:c,a,t". For training only."""

    name = "simple-spelling"

    def __init__(self, words: Sequence[str], size: int, split: str = "train", **slice_: Any):
        super().__init__(**slice_)
        self.words, self.size, self.first_seed = _checked(words), size, _first_seed(split)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        word = Rng(self.first_seed + index).pick(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": f"{word}:{','.join(word)}"},
            ]
        }


class SpellingBee(Task):
    """Counting a letter; right if the number after "####" is."""

    name = "spelling-bee"

    def __init__(self, words: Sequence[str], size: int, split: str = "train", **slice_: Any):
        super().__init__(**slice_)
        self.words, self.size, self.first_seed = _checked(words), size, _first_seed(split)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        rng = Rng(self.first_seed + index)
        word = rng.pick(self.words)
        letter = rng.pick(word) if rng.chance(90) else rng.pick(ALPHABET)
        quote_l, quote_w = rng.pick(QUOTES), rng.pick(QUOTES)
        asked = rng.pick(ASKED).format(l=f"{quote_l}{letter}{quote_l}", w=f"{quote_w}{word}{quote_w}")
        asked = (asked.lower() if rng.chance(25) else asked) + rng.pick(MARKS)
        count = word.count(letter)
        steps = (
            f"I count the letter '{letter}' in '{word}'. First the spelling:\n{word}:{','.join(word)}\n\n"
            f"Then letter by letter:\n{count_lines(word, letter)}\nThat makes {count}. I check it:\n"
        )
        code = f"'{word}'.count('{letter}')"
        answer = tool_answer(code, str(count), f"Python says {count}.\n\n#### {count}")
        content = [{"type": "text", "text": steps}, *answer]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": content}]}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        found = final_answer(answer)
        return found is not None and found == final_answer(text_of(conversation["messages"][-1]["content"]))


def count_lines(word: str, letter: str) -> str:
    """One line a letter: "2:a", and "3:r hit! count=1" where it is the one that is counted."""
    lines, count = "", 0
    for place, found in enumerate(word, start=1):
        count += found == letter
        lines += f"{place}:{found}" + (f" hit! count={count}" if found == letter else "") + "\n"
    return lines


def _first_seed(split: str) -> int:
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, found {split!r}")
    return 0 if split == "train" else TEST_SEED


def _checked(words: Sequence[str]) -> Sequence[str]:
    if not words or not all(map(str.isalpha, words)):
        raise ValueError("words must be a list of at least one word, each of letters only")
    return words
