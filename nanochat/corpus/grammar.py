"""A small template language and its reader, for every text of the corpus that is not a plain table.

The file format is described at the top of stories.txt. A template is compiled once into a list of parts;
filling it draws from an Rng and remembers what each slot was given, so that a text is consistent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import NamedTuple

from nanochat.corpus.rng import Rng

TOKEN = re.compile(r"\{[^{}]*\}|<[^<>]*>")
SLOT = re.compile(r"(\^?)(a |\*)?([a-z.]+?\d?)(?:\.(\d))?")


class Slot(NamedTuple):
    name: str
    source: str  # the list it is drawn from: its name without a digit
    field: int
    is_capital: bool
    is_article: bool
    is_fresh: bool


Part = str | Slot | list  # a list holds the compiled choices


def article(word: str) -> str:
    """'an apple', 'a dog'; words that already carry an article are left alone."""
    if word.startswith(("a ", "an ", "the ")):
        return word
    return ("an " if word[0] in "aeioAEIO" or word.startswith(("umb", "unc", "unh")) else "a ") + word


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@cache
def compiled(template: str) -> tuple[Part, ...]:
    """The parts of a template: literal strings, slots, and lists of compiled choices."""
    parts: list[Part] = []
    end = 0
    for match in TOKEN.finditer(template):
        if match.start() > end:
            parts.append(template[end : match.start()])
        end = match.end()
        inner = match.group()[1:-1]
        if match.group()[0] == "<":
            parts.append([compiled(choice) for choice in inner.split("|")])
            continue
        slot = SLOT.fullmatch(inner)
        if slot is None:
            raise ValueError(f"a slot must look like {{^a name2.1}}, found {{{inner}}} in {template!r}")
        cap, mode, name, field = slot.groups()
        source = name.rstrip("0123456789")
        parts.append(Slot(name, source, int(field or 0), cap == "^", mode == "a ", mode == "*"))
    if end < len(template):
        parts.append(template[end:])
    return tuple(parts)


def data_lines(name: str) -> list[str]:
    """The lines of a data file of this package, without comments."""
    text = resources.files("nanochat.corpus").joinpath(name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


class Grammar:
    """Lists of words and phrases, and plots: sequences of beats, each told in one of several ways."""

    def __init__(self, lines: Iterable[str]):
        self.lists: dict[str, list[str]] = {}
        self.plots: dict[str, list[tuple[bool, list[str]]]] = {}
        target: list[str] = []
        beats: list[tuple[bool, list[str]]] | None = None
        for line in lines:
            if line.startswith("@@"):
                beats = self.plots.setdefault(line[2:], [])
            elif line.startswith("@"):
                beats, target = None, self.lists.setdefault(line[1:], [])
            elif line and beats is None:
                target.append(line)
            elif line and beats is not None:
                if line[0] in ".?":
                    beats.append((line[0] == "?", []))
                beats[-1][1].append(line[2:])

    def fill(self, template: str, rng: Rng, slots: dict[str, str]) -> str:
        """The text of a template. Slots not given yet are drawn, distinct from like ones, and added."""
        return "".join(self._parts(compiled(template), rng, slots))

    def _parts(self, parts: tuple[Part, ...], rng: Rng, slots: dict[str, str]) -> list[str]:
        out: list[str] = []
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            elif isinstance(part, list):
                out += self._parts(rng.pick(part), rng, slots)
            else:
                out.append(self._slot(part, rng, slots))
        return out

    def _slot(self, slot: Slot, rng: Rng, slots: dict[str, str]) -> str:
        if slot.is_fresh:
            text = self.fill(rng.pick(self.lists[slot.source]), rng, slots)
        else:
            value = slots.get(slot.name)
            if value is None:
                value = rng.pick(self.lists[slot.source])
                while slot.name != slot.source and value == slots.get(slot.source):
                    value = rng.pick(self.lists[slot.source])
                slots[slot.name] = value
            text = value.split(";")[slot.field] if ";" in value else value
            if slot.is_article:
                text = article(text)
        return text[:1].upper() + text[1:] if slot.is_capital else text

    def tell(self, plot: str, rng: Rng, slots: dict[str, str]) -> str:
        """One telling of a plot: every beat, and about half of those that may be left out."""
        told = []
        for is_optional, ways in self.plots[plot]:
            if not is_optional or rng.chance(50):
                told.append(self.fill(rng.pick(ways), rng, slots))
        return " ".join(told)


@cache
def grammar(name: str) -> Grammar:
    """The grammar in a data file of this package, read once."""
    return Grammar(data_lines(name))
