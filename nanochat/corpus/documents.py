"""Pretraining documents: `document(seed, index)` is a pure function, so any one can be made at any time."""

from __future__ import annotations

from nanochat.corpus import choices, facts, letters, lookups, numbers, stories
from nanochat.corpus.chats import casual
from nanochat.corpus.grammar import grammar
from nanochat.corpus.rng import Rng, mix_text

STREAM = mix_text("documents")


def fact_document(rng: Rng) -> str:
    """A paragraph over one topic, over one subject, or over whatever comes to mind."""
    kind = rng.below(4)
    fact = facts.any_fact(rng)
    about = facts.facts_about().get(fact.subject)
    if kind == 0 and about:
        first = " ".join(rng.pick(f.statements) for f in rng.sample(about, 4))
        again = " ".join(rng.pick(f.statements) for f in rng.sample(about, 3))
        return f"{first}\n{again}"
    if kind == 3:
        chosen, title = [facts.any_fact(rng) for _ in range(rng.between(4, 7))], ""
    else:
        title, group = facts.topic_of()[fact.relation]
        chosen = [fact, *rng.sample([f for f in group if f is not fact], rng.between(3, 6))]
    if kind == 1:
        return f"{title}\n" + "\n".join(f"- {rng.pick(f.statements)}" for f in chosen)
    text = " ".join(rng.pick(f.statements) for f in chosen)
    return f"{title}\n{text}" if title and rng.chance(50) else text


def dialogue_document(rng: Rng) -> str:
    """Two people who ask and answer."""
    g = grammar("stories.txt")
    first, second = rng.pick(g.lists["girl"]), rng.pick(g.lists["boy"])
    if rng.chance(50):
        first, second = second, first
    form = rng.pick(("{a}: {q}\n{b}: {r}", "Question: {q}\nAnswer: {r}", '{a} asked: "{q}"\n{b} said: "{r}"'))
    told = []
    for _ in range(rng.between(3, 5)):
        fact = facts.any_fact(rng)
        told.append(form.format(a=first, b=second, q=casual(rng, rng.pick(fact.questions)), r=fact.reply))
        if rng.chance(15):
            first, second = second, first
    return "\n".join(told)


def list_document(rng: Rng) -> str:
    """Lists of things of a kind, of numbers, of the days and months in their order."""
    lines = []
    for _ in range(rng.between(3, 5)):
        kind = rng.pick(letters.kinds())
        words = letters.kind_words(kind)
        if rng.chance(30):
            kind = rng.pick(("day", "month", "number", "planet"))
            words = letters.kind_words(kind)
            lines.append(f"In order: {', '.join(words)}.")
            continue
        some = rng.sample(words, 4)
        ways = (
            f"Kind: {kind}. Examples: {', '.join(some)}.",
            f"{', '.join(some[:3])} and {some[3]}: each of these is of the kind {kind}.",
            f"{some[0]} ({kind}), {some[1]} ({kind}), {some[2]} ({kind})",
        )
        lines.append(rng.pick(ways))
    return "\n".join(lines)


KINDS = {
    stories.story: 13,
    fact_document: 26,
    dialogue_document: 17,
    choices.quiz_document: 6,
    lookups.table_document: 11,
    lookups.echo_document: 6,
    numbers.document: 6,
    letters.document: 12,
    list_document: 3,
}
DECK = [make for make, weight in KINDS.items() for _ in range(weight)]


def document(seed: int, index: int) -> str:
    """Document number `index` (from 0, without end) of the corpus `seed`: the same bytes everywhere."""
    rng = Rng(STREAM, seed, index)
    return rng.pick(DECK)(rng)
