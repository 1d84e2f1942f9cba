"""Training conversations: `conversation(kind, seed, index)` is a pure function, like `document`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from nanochat.corpus import choices, facts, letters, lookups, numbers, stories
from nanochat.corpus.grammar import capital, grammar
from nanochat.corpus.rng import Rng, mix_text

Conversation = dict[str, Any]
Content = str | list[dict[str, str]]
Turns = list[tuple[str, Content]]  # (user, assistant) in turn


def tool_answer(code: str, output: str, text: str) -> list[dict[str, str]]:
    """An assistant message that calls the tool and restates what it printed."""
    return [
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    ]


def messages(turns: Turns) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn)
    ]


def _line(rng: Rng, name: str, slots: dict[str, str] | None = None) -> list[str]:
    """A line of chats.txt, filled, cut at " => "."""
    g = grammar("chats.txt")
    text = g.fill(rng.pick(g.lists[name]), rng, {} if slots is None else slots)
    return [capital(part) for part in text.split(" => ")]


@cache
def small_words() -> frozenset[str]:
    """Words that people leave out when they type a question in a hurry."""
    return frozenset(word for line in grammar("chats.txt").lists["small"] for word in line.split())


def stray(rng: Rng) -> str:
    """Now and then a word that does not belong there, after a space: what is copied must end before it."""
    words = [word for line in grammar("chats.txt").lists["stray"] for word in line.split("|")]
    return " " + rng.pick(words) if rng.chance(40) else ""


def casual(rng: Rng, question: str, needed: tuple[str, ...] = ()) -> str:
    """Now and then a question as people type it: with an opening or an ending that says nothing, without
    capitals and marks, and with small words left out, but not the `needed` ones. So that no answer hangs on
    one wording.
    """
    g = grammar("chats.txt")
    if rng.chance(25):
        words, small = question.split(" "), small_words().difference(needed)
        kept = [w for w in words if w.lower() not in small or rng.chance(60)]
        question = capital(" ".join(kept if len(kept) > 1 else words))
    if rng.chance(20):
        question = g.fill("{*lead}", rng, {}) + question
    if not question.endswith("= ?") and rng.chance(20):
        mark = question[-1] if question[-1] in "?." else ""
        question = question.removesuffix(mark) + g.fill("{*tail}", rng, {}) + stray(rng) + mark
    return question.lower().rstrip("?. ") if rng.chance(7) else question


def identity(rng: Rng) -> Turns:
    question, answer = _line(rng, "identity")
    return [(casual(rng, question), answer)]


def smalltalk(rng: Rng) -> Turns:
    question, answer = _line(rng, "smalltalk")
    if answer.endswith("hear a story?") and rng.chance(50):
        return [(question, answer), (_line(rng, "story.reply")[0], stories.story(rng))]
    return [(question, answer)]


def unknown(rng: Rng) -> Turns:
    fake = letters.invented(rng) + rng.pick(("", "", "ia", "land", "stan"))
    question, answer = _line(rng, "unknown", {"fake": capital(fake)})
    return [(question, answer)]


def recall(rng: Rng) -> Turns:
    """The user says something about themselves and asks for it later, perhaps after another question."""
    g = grammar("stories.txt")
    slots = {name: rng.pick(g.lists[name]) for name in ("animal", "colour", "pet", "food")}
    slots["name"] = rng.pick(g.lists[rng.pick(("girl", "boy"))])
    said, reply, asked, answer = _line(rng, "recall", slots)
    between = fact(rng) if rng.chance(30) else []
    return [(said, reply), *between, (asked, answer)]


def fact(rng: Rng) -> Turns:
    one = facts.any_fact(rng)
    return [(casual(rng, rng.pick(one.questions)), one.reply)]


def choice(rng: Rng) -> Turns:
    """A multiple-choice question; some easy ones, some after or before the same question put openly."""
    one = facts.any_fact(rng)
    easy = rng.chance(30)
    asked, shown, place = choices.easy_question(rng) if easy else choices.fact_question(rng, one)
    turns: Turns = [(choices.render_multiple_choice(asked, choices.LETTERS, shown), choices.LETTERS[place])]
    opened = (rng.pick(one.questions), one.reply)
    way = 9 if easy else rng.below(10)
    if way == 0:
        return [opened, *turns]
    return [*turns, opened] if way == 1 else turns


def count(rng: Rng) -> Turns:
    word = letters.any_word(rng)
    letter = letters.draw_letter(rng, word)
    number = word.count(letter)
    answer = tool_answer(letters.expression(word, letter), str(number), letters.counted(letter, number))
    return [(casual(rng, letters.count_question(rng, word, letter), (letter, word)), answer)]


def arithmetic(rng: Rng) -> Turns:
    question, s, answer = numbers.question(rng)
    return [(casual(rng, question), tool_answer(s.text, str(s.value), answer))]


def spelling(rng: Rng) -> Turns:
    word = letters.any_word(rng)
    g = grammar("numbers.txt")
    return [(g.fill(rng.pick(g.lists["spelling"]), rng, {"w": word}), letters.spelled(word) + ".")]


def story(rng: Rng) -> Turns:
    """A story on request, about an animal or a child if the user names one."""
    g, way = grammar("stories.txt"), rng.below(3)
    if way == 0:
        return [(_line(rng, "story.ask")[0], stories.story(rng))]
    if way == 1:
        animal = rng.pick(g.lists["animal"])
        return [(_line(rng, "story.about", {"animal": animal})[0], stories.story(rng, animal=animal))]
    name = rng.pick(g.lists[rng.pick(("girl", "boy"))])
    return [(_line(rng, "story.named", {"name": name})[0], stories.story(rng, name=name))]


def mixed(rng: Rng) -> Turns:
    """Several turns, each of any kind."""
    turns: Turns = smalltalk(rng) if rng.chance(30) else []
    parts = (fact, fact, fact, count, arithmetic, arithmetic, identity, choice, spelling, unknown)
    for _ in range(rng.between(2, 3)):
        turns += rng.pick(parts)(rng)
    return turns


MAKERS: dict[str, Callable[[Rng], Turns]] = {
    "identity": identity,
    "smalltalk": smalltalk,
    "unknown": unknown,
    "recall": recall,
    "facts": fact,
    "choice": choice,
    "letters": count,
    "arithmetic": arithmetic,
    "spelling": spelling,
    "story": story,
    "mixed": mixed,
    "reorder": lookups.reorder,
    "lookup": lookups.lookup,
    "quiz": lookups.quiz,
    "far_lookup": lookups.far_lookup,
    "far_quiz": lookups.far_quiz,
    "copy": lookups.copy,
}
KINDS = tuple(MAKERS)
STREAMS = {kind: mix_text(kind) for kind in KINDS}


def conversation(kind: str, seed: int, index: int) -> Conversation:
    """Training conversation number `index` of a kind in KINDS: the same on every platform."""
    if kind not in MAKERS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; found {kind!r}")
    return {"messages": messages(MAKERS[kind](Rng(STREAMS[kind], seed, index)))}
