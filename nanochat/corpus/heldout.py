"""The held-out sets: what training teaches, asked in phrasings, operands and words that it never shows.

The facts asked are the facts of the table. The sets are committed in tasks/heldout, one JSON object
a line; a test makes them again and compares, and searches the training text for them.
"""

from __future__ import annotations

from typing import Any

from nanochat.corpus import choices, facts, letters, numbers
from nanochat.corpus.chats import Conversation, messages, tool_answer
from nanochat.corpus.grammar import capital, grammar
from nanochat.corpus.rng import Rng, mix_text

SEED = 1
SIZE = 200
SIZE_IDENTITY = 80
Record = dict[str, Any]

PRESENTATION = "I am nanochat, a small language model. You trained me on this computer from nothing."
ABILITIES = (
    "I am nanochat. I can answer simple questions, calculate, count letters, spell words and tell stories."
)


def _rng(name: str) -> Rng:
    return Rng(mix_text("held out " + name), SEED)


def arithmetic() -> list[Record]:
    """{"question", "code", "answer", "reply"}: sums, differences, products and word problems."""
    rng, seen = _rng("arithmetic"), set()
    made: list[Record] = []
    while len(made) < SIZE:
        asked, s, reply = numbers.question(rng, held_out=True)
        if s not in seen:
            seen.add(s)
            made.append({"question": asked, "code": s.text, "answer": str(s.value), "reply": reply})
    return made


def letter_counting() -> list[Record]:
    """{"question", "code", "answer", "reply"}: one question for each word."""
    rng, made = _rng("letters"), []
    for word in rng.sample(letters.held_out_words(), SIZE):
        letter = letters.draw_letter(rng, word)
        asked, count = letters.count_question(rng, word, letter, held_out=True), word.count(letter)
        code, reply = letters.expression(word, letter), letters.counted(letter, count)
        made.append({"question": asked, "code": code, "answer": str(count), "reply": reply})
    return made


def fact_questions() -> list[Record]:
    """{"question", "accepted", "reply"}: open questions over different facts."""
    rng = _rng("facts")
    return [
        {"question": rng.pick(f.new_questions), "accepted": list(f.accepted), "reply": f.reply}
        for f in rng.sample(facts.facts(), SIZE)
    ]


def multiple_choice() -> list[Record]:
    """{"question", "choices", "reply"}: four choices, the wrong ones of the same kind as the right one."""
    rng, made = _rng("multiple choice"), []
    for fact in rng.sample(facts.facts(), SIZE):
        asked, shown, place = choices.fact_question(rng, fact, held_out=True)
        made.append({"question": asked, "choices": shown, "reply": choices.LETTERS[place]})
    return made


def identity() -> list[Record]:
    """{"question", "required", "reply"}: of each inner list of words the answer must have one."""
    rng, g = _rng("identity"), grammar("chats.txt")
    made: dict[str, Record] = {}
    lines = g.lists["new.identity"]
    while len(made) < SIZE_IDENTITY:
        for line in rng.sample(lines, len(lines)):
            asked, _, needed = g.fill(line, rng, {}).partition(" => ")
            required = [words.split("/") for words in needed.split(",")]
            reply = ABILITIES if "calculate" in required[-1] else PRESENTATION
            made.setdefault(asked, {"question": capital(asked), "required": required, "reply": reply})
    return list(made.values())[:SIZE_IDENTITY]


def heldout_sets() -> dict[str, list[Record]]:
    """Every set under the name of its file, the same each time."""
    return {
        "arithmetic": arithmetic(),
        "letters": letter_counting(),
        "facts": fact_questions(),
        "multiple_choice": multiple_choice(),
        "identity": identity(),
    }


def as_conversation(record: Record) -> Conversation:
    """A record as a conversation that ends with the reference answer, with what grading needs beside it."""
    asked, reply = record["question"], record["reply"]
    extra: Record = {key: record[key] for key in ("answer", "accepted", "required") if key in record}
    if "choices" in record:
        asked = choices.render_multiple_choice(asked, choices.LETTERS, record["choices"])
        extra["letters"] = list(choices.LETTERS)
    if "code" in record:
        reply = tool_answer(record["code"], record["answer"], reply)
    return {"messages": messages([(asked, reply)]), **extra}
