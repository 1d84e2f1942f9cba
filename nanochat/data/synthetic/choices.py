"""Multiple-choice questions: over the facts, and easy ones that teach which letter goes with which choice."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.data.synthetic import facts, letters, numbers
from nanochat.data.synthetic.rng import Rng

LETTERS = ("A", "B", "C", "D")


def render_multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The text of a multiple-choice question. The letter follows its choice without a space, so that it is
    the same token as in the answer."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    return (
        f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    )


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
    """Quiz questions with their choices, for pretraining; not in the form of the conversations, whose
    "=A" must not become one token. Most judge each choice: four answers to learn from instead of one."""
    told = []
    judged = rng.chance(65)
    for _ in range(rng.between(2, 3)):
        fact = facts.any_fact(rng)
        asked, shown, place = fact_question(rng, fact) if rng.chance(65) else easy_question(rng)
        if judged:
            lines = "\n".join(
                f"- {choice}: {'yes' if n == place else 'no'}" for n, choice in enumerate(shown)
            )
            told.append(f"Question: {asked}\n{lines}")
            continue
        marks = rng.pick((("A", "B", "C", "D"), ("1", "2", "3", "4")))
        sign = " = " if marks[0] == "A" else "="
        lines = "\n".join(f"- {choice}{sign}{mark}" for choice, mark in zip(shown, marks))
        told.append(f"Question: {asked}\n{lines}\nThe correct answer is {marks[place]}, {shown[place]}.")
    head = rng.pick(
        ("Respond with the letter or the number of the correct answer.\n", "Multiple Choice\n", "")
    )
    return ("" if judged else head) + "\n\n".join(told)


def lookup_document(rng: Rng) -> str:
    """A numbered list, then the number of each entry: the step from a choice to its mark, many times over.

    Entries are words, asked for by themselves, or the answers of facts, asked for by their questions.
    """
    count = rng.between(4, 6)
    marks = (
        [str(n + 1) for n in range(count)]
        if rng.chance(50)
        else [str(n) for n in rng.sample(range(1, 10), count)]
    )
    if rng.chance(50):
        entries = rng.sample(letters.training_words(), count)
        forms = ("- {w}={m}", "- {w}={m}", "And {w}? {m}", "Which is {w}? {m}", "The number of {w} is {m}.")
        form = rng.pick(
            forms
        )  # a space before the word throughout, so that it is the same token as in the list
        asked = [form.format(w=w, m=m) for w, m in zip(entries, marks)]
    else:
        known: dict[str, facts.Fact] = {}
        while len(known) < count:
            fact = facts.any_fact(rng)
            known.setdefault(fact.answer, fact)
        entries = list(known)
        form = rng.pick(("{q} {m}", "{q} {m}, {a}.", "Question: {q}\nThe correct answer is {m}."))
        pairs = zip(known.values(), marks)
        asked = [form.format(q=rng.pick(fact.questions), m=m, a=fact.answer) for fact, m in pairs]
    listed = "\n".join(f"- {entry}={mark}" for entry, mark in zip(entries, marks))
    return listed + "\n" + "\n".join(rng.sample(asked, count))


def follow_ups(rng: Rng, shown: Sequence[str]) -> list[tuple[str, str]]:
    """(question, letter) about the entries of a list that has just been shown."""
    form = rng.pick(("Which letter is {w}?", "And {w}?", "And which letter is '{w}'?", "The letter of {w}?"))
    places = rng.sample(range(len(shown)), rng.between(2, 4))
    return [(form.format(w=shown[place]), LETTERS[place]) for place in places]
