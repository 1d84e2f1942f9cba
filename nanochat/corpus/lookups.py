"""Lists with a letter at each line, and what can be asked about them: the way to multiple choice.

Small models learn to look things up in steps, and only from tokens that can be known (docs/decisions.md):
first `reorder`, where the entry stands right before the letter that belongs to it, then `lookup`, where the
question names it, then `quiz`, where the question is about a fact and the entry must be known, last the
same from farther away. Draws are independent, so that "the letter not used yet" is never a hint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanochat.corpus import choices, facts, letters
from nanochat.corpus.rng import Rng

MARKS = "ABCDEF"
NUM_QUESTIONS = 6
NUM_REORDERED = 8

Turns = list[tuple[str, Any]]


def listed(entries: list[str]) -> str:
    """The lines of a list, as in a multiple-choice question."""
    return "\n".join(f"- {entry}={mark}" for entry, mark in zip(entries, MARKS))


def different_facts(rng: Rng, count: int, group: tuple[facts.Fact, ...] = ()) -> list[facts.Fact]:
    """`count` facts with different answers, or fewer if the group has fewer."""
    known: dict[str, facts.Fact] = {}
    for fact in rng.sample(group or facts.facts(), len(group) or 4 * count):
        known.setdefault(fact.answer, fact)
    return list(known.values())[:count]


def entries(rng: Rng, count: int) -> list[str]:
    """Different words, known or invented, numbers, or answers of facts."""
    way = rng.below(10)
    if way < 4:
        return rng.sample(letters.training_words(), count)
    if way < 6:
        return [rng.pick((letters.invented, letters.blended))(rng) for _ in range(count)]
    if way < 7:
        return [str(n) for n in rng.sample(range(2, 999), count)]
    return [fact.answer for fact in different_facts(rng, count)]


def reorder(rng: Rng) -> Turns:
    """The lines of a list again in any order: only the letters are learned."""
    shown = entries(rng, rng.between(4, len(MARKS)))
    ask = rng.pick(
        (
            "Show this list in another order.",
            "Read these lines in any order.",
            "Write these lines in another order.",
            "Mix the lines of this list.",
        )
    )
    parts = []
    for n in range(NUM_REORDERED):
        place = rng.below(len(shown))
        parts.append({"type": "given", "text": ("\n" if n else "") + f"- {shown[place]}"})
        parts.append({"type": "text", "text": f"={MARKS[place]}"})
    return [(f"{ask}\n{listed(shown)}", parts)]


TAILS = (
    *("", ""),
    *(choices.RESPOND, choices.RESPOND),
    *("\nAnswer with one letter.", "\nSay only the letter.", "\n\nChoose a letter."),
)


def asked_about(
    rng: Rng, shown: list[str], question: Callable[[int], str], count: int, *, list_last: int, tails: int
) -> Turns:
    """`count` questions, each about the entry at a random place, the list beside the first of them.

    In `list_last` per cent the list follows the first question, which the answer must then look back to;
    `tails` per cent of the questions are followed by one of TAILS.
    """
    turns: Turns = []
    for n in range(count):
        place = rng.below(len(shown))
        text = question(place)
        if n == 0:
            head = choices.HEAD if rng.chance(tails * 2 // 5) else ""
            lines = listed(shown)
            text = f"{head}{text}\n{lines}" if rng.chance(list_last) else f"{lines}\n{head}{text}"
        turns.append((text + (rng.pick(TAILS) if rng.chance(tails) else ""), MARKS[place]))
    return turns


def ask_for(rng: Rng, shown: list[str]) -> Callable[[int], str]:
    """Questions that name the entry."""
    ways = ("Which letter is {w}?", "And {w}?", "Which letter has {w}?", "The letter of {w}?", "{w}?")
    return lambda place: rng.pick(ways).format(w=shown[place])


def topic_facts(rng: Rng, count: int, percent: int) -> list[facts.Fact]:
    """Facts with different answers; in `percent` per cent of one topic, where it has as many as three."""
    chosen = different_facts(rng, count)
    if rng.chance(percent):
        _, group = facts.topic_of()[facts.any_fact(rng).relation]
        of_topic = different_facts(rng, count, group)
        chosen = of_topic if len(of_topic) >= 3 else chosen
    return chosen


def lookup(rng: Rng) -> Turns:
    """Which letter an entry has, several times over."""
    shown = entries(rng, rng.between(4, len(MARKS)))
    return asked_about(rng, shown, ask_for(rng, shown), NUM_QUESTIONS, list_last=50, tails=0)


def quiz(rng: Rng) -> Turns:
    """Questions about facts, answered by the letters of a list."""
    chosen = topic_facts(rng, rng.between(4, len(MARKS)), 40)
    shown = [fact.answer for fact in chosen]
    return asked_about(
        rng, shown, lambda place: rng.pick(chosen[place].questions), NUM_QUESTIONS, list_last=0, tails=0
    )


def far_lookup(rng: Rng) -> Turns:
    """As lookup, the answer farther from the question: behind the list, behind what is said after it."""
    shown = entries(rng, rng.between(3, 5))
    return asked_about(rng, shown, ask_for(rng, shown), rng.between(1, 4), list_last=70, tails=100)


def far_quiz(rng: Rng) -> Turns:
    """As quiz, the answer farther from the question."""
    chosen = topic_facts(rng, rng.between(3, 5), 60)
    shown = [fact.answer for fact in chosen]
    return asked_about(
        rng,
        shown,
        lambda place: rng.pick(chosen[place].questions),
        rng.between(1, 4),
        list_last=70,
        tails=100,
    )


COPY = (
    "Write '{w}' in brackets.", "Put the word '{w}' in brackets.", "'{w}' in brackets, please.",
    "Put {w} in brackets.", "Write the word {w} in brackets.", "Now {w}.", "And '{w}'?",
)  # fmt: skip


def copy(rng: Rng) -> Turns:
    """Words put into the brackets of a tool call, and words said again."""
    turns: Turns = []
    for _ in range(rng.between(4, 7)):
        word = letters.any_word(rng)
        turns.append((rng.pick(COPY).format(w=word), f"('{word}')"))
    words = [letters.any_word(rng) for _ in range(rng.between(3, 5))]
    ask = rng.pick(("Say after me:", "Repeat:", "Write this again:"))
    return [*turns, (f"{ask} {', '.join(words)}.", f"{', '.join(words)}.")]


def echo_document(rng: Rng) -> str:
    """Words and numbers said twice, for pretraining."""

    def word() -> str:
        return str(rng.between(2, 999)) if rng.chance(20) else letters.any_word(rng)

    lines = []
    for _ in range(rng.between(2, 3)):
        words = [word() for _ in range(rng.between(4, 9))]
        plain, quoted = " ".join(words), " ".join(f"'{w}'" for w in words)
        ways = (
            f"Say after me: {', '.join(words)}.\n{', '.join(words)}.",
            f"{quoted}\n" + " ".join(f"('{w}')" for w in words),
            "\n".join(f"Write '{w}': {w}. Again: ('{w}')" for w in words[:5]),
            f"{plain}\n{plain}",
        )
        lines.append(rng.pick(ways))
    return "\n".join(lines)


def table_document(rng: Rng) -> str:
    """A list with a letter at each line, then the same lines or questions in any order, for pretraining.

    At times the first question stands before the list, as in a multiple-choice question.
    """
    chosen = different_facts(rng, rng.between(4, len(MARKS)))
    is_facts = rng.chance(50)
    shown = [fact.answer for fact in chosen] if is_facts else entries(rng, len(chosen))
    told = [listed(shown)]
    if rng.chance(40):
        place = rng.below(len(shown))
        asked = rng.pick(chosen[place].questions) if is_facts else f"Which letter is {shown[place]}?"
        told = [asked, *told, MARKS[place]]
    for _ in range(rng.between(1, 2)):
        forms: tuple[str, ...] = (
            "- {e}={m}",
            "- {e}={m}",
            "Which letter is {e}?\n{m}",
            "{m}: {e}",
            "And {e}? {m}",
        )
        if is_facts and rng.chance(60):
            forms = ("{q} {m}", "{q}\n{m}", "Question: {q}\n{m}, {e}")
        form = rng.pick(forms)
        for place in rng.sample(range(len(shown)), len(shown)):
            told.append(form.format(e=shown[place], m=MARKS[place], q=rng.pick(chosen[place].questions)))
    return "\n".join(told)
