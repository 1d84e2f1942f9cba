"""Multiple-choice questions: over the facts, and easy ones that teach which letter goes with which choice."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.corpus import facts, letters, numbers
from nanochat.corpus.rng import Rng

LETTERS = ("A", "B", "C", "D")
HEAD = "Multiple Choice question: "
RESPOND = "\n\nRespond only with the letter of the correct answer."


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The text of a multiple-choice question; the letter follows its choice without a space."""
    lines = "\n".join(f"- {choice}={letter}" for letter, choice in zip(letters, choices))
    return f"{HEAD}{question}\n{lines}{RESPOND}"


def fact_question(rng: Rng, fact: facts.Fact, *, held_out: bool = False) -> tuple[str, list[str], int]:
    """(question, four choices, place of the right one) about a fact."""
    asked = rng.pick(fact.new_questions if held_out else fact.questions)
    return asked, *facts.choices(fact, rng)


def _place(rng: Rng, right: str, wrong: list[str]) -> tuple[list[str], int]:
    place = rng.below(len(wrong) + 1)
    return [*wrong[:place], right, *wrong[place:]], place


def easy_question(rng: Rng) -> tuple[str, list[str], int]:
    """(question, choices, place) that needs no knowledge, or only the kind of a word."""
    way = rng.below(6)
    if way == 0:
        right, *wrong = rng.sample(letters.training_words(), 4)
        ask = rng.pick(("Which choice is the word '{w}'?", "Find the word {w}.", "Which of these is '{w}'?"))
        return ask.format(w=right), *_place(rng, right, wrong)
    if way == 1:
        fact = facts.any_fact(rng)
        shown, place = facts.choices(fact, rng)
        ask = rng.pick(
            ("Which choice is '{w}'?", "The answer is {w}. Which letter is it?", "Which of these is {w}?")
        )
        return ask.format(w=fact.answer), shown, place
    if way == 2:
        number, *rest = rng.sample(range(2, 100), 4)
        return f"Which choice is the number {number}?", *_place(rng, str(number), [str(n) for n in rest])
    if way == 3:
        s = numbers.small_sum(rng)
        rest = rng.sample([n for n in range(max(0, s.value - 5), s.value + 6) if n != s.value], 3)
        return f"What is {s.text}?", *_place(rng, str(s.value), [str(n) for n in rest])
    kind, *others = rng.sample(letters.kinds(), 5)
    others = [k for k in others if (kind, k) != ("animal", "insect")][:3]
    right = rng.pick(letters.kind_words(kind))
    wrong = [
        rng.pick([w for w in letters.kind_words(k) if w not in letters.kind_words(kind)]) for k in others
    ]
    a = "an" if kind[0] in "aeiou" else "a"
    if kind in ("furniture", "clothing"):
        a = "a piece of"
    ask = rng.pick(
        (f"Which of these is {a} {kind}?", f"Which word is {a} {kind}?", f"Which choice is {a} {kind}?")
    )
    return ask, *_place(rng, right, wrong)


def quiz_document(rng: Rng) -> str:
    """Quiz questions with their choices and the right one, for pretraining."""
    told = []
    for _ in range(rng.between(2, 3)):
        fact = facts.any_fact(rng)
        asked, shown, place = fact_question(rng, fact) if rng.chance(70) else easy_question(rng)
        lines = "\n".join(f"- {choice}={letter}" for choice, letter in zip(shown, LETTERS))
        ways = ("The correct answer is {e}.\n{m}", "{m}, {e}.", "{e}={m}", "Answer: {m}")
        told.append(f"Question: {asked}\n{lines}\n" + rng.pick(ways).format(e=shown[place], m=LETTERS[place]))
    return "\n\n".join(told)
