"""The facts table: every fact with its statements, questions and wrong choices, rendered once.

The file format is described at the top of facts.txt. Questions come in two disjoint sets of phrasings:
`questions` for training, `new_questions` for the held-out sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from nanochat.corpus.grammar import capital, data_lines, grammar
from nanochat.corpus.rng import Rng


@dataclass(frozen=True)
class Relation:
    """One kind of fact, for instance "is the capital of", and its phrasings."""

    name: str
    title: str = ""
    templates: dict[str, list[str]] = field(default_factory=lambda: {mark: [] for mark in "=?!>~"})
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Fact:
    """One fact in all its phrasings. `accepted` are the answers that count as right."""

    relation: str
    subject: str
    answer: str
    accepted: tuple[str, ...]
    wrong: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    new_questions: tuple[str, ...]
    reply: str


def read_relations(lines: list[str]) -> list[Relation]:
    relations: list[Relation] = []
    for line in lines:
        mark, text = line[:1], line[2:]
        if mark == "[":
            relations.append(Relation(line.strip("[]")))
        elif mark == ":":
            relations[-1] = Relation(relations[-1].name, title=text)
        elif mark == "-":
            relations[-1].rows.append([cell.strip() for cell in text.split("|")] + ["", ""])
        elif mark:
            relations[-1].templates[mark].append(text)
    return relations


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the table, in the order of the file."""
    return tuple(fact for _, group in topics() for fact in group)


@cache
def topics() -> tuple[tuple[str, tuple[Fact, ...]], ...]:
    """(title, facts) of every relation."""
    return tuple((r.title, _facts(r)) for r in read_relations(data_lines("facts.txt")))


def _facts(relation: Relation) -> tuple[Fact, ...]:
    g, unused = grammar("stories.txt"), Rng(0)
    objects = list(dict.fromkeys(row[1] for row in relation.rows)) + relation.templates["~"]
    made = []
    for subject, answer, also, wrong, *_ in relation.rows:
        p, _, q = subject.partition("@")
        slots = {"s": f"{p} in {q}" if q else subject, "o": answer, "p": p, "q": q}

        def say(mark: str, slots: dict[str, str] = slots) -> tuple[str, ...]:
            return tuple(capital(g.fill(t, unused, slots)) for t in relation.templates[mark])

        accepted = (answer, *(a.strip() for a in also.split(",") if a.strip()))
        others = [w.strip() for w in wrong.split(",") if w.strip()]
        others = others or [o for o in objects if o not in accepted]
        made.append(
            Fact(relation.name, slots["s"], answer, accepted, tuple(others),
                 say("="), say("?"), say("!"), say(">")[0])
        )  # fmt: skip
    return tuple(made)


@cache
def topic_of() -> dict[str, tuple[str, tuple[Fact, ...]]]:
    """(title, facts) of a relation, by its name."""
    return {group[0].relation: (title, group) for title, group in topics()}


@cache
def facts_about() -> dict[str, tuple[Fact, ...]]:
    """The facts that share a subject, for the subjects with several."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts():
        groups.setdefault(fact.subject, []).append(fact)
    return {subject: tuple(group) for subject, group in groups.items() if len(group) > 1}


def any_fact(rng: Rng) -> Fact:
    return rng.pick(facts())


def choices(fact: Fact, rng: Rng, count: int = 4) -> tuple[list[str], int]:
    """`count` choices for a question about a fact, and the place of the right one."""
    picked = rng.sample(fact.wrong, count - 1)
    place = rng.below(len(picked) + 1)
    return [*picked[:place], fact.answer, *picked[place:]], place
