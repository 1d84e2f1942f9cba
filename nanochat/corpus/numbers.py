"""Arithmetic: expressions, questions about them, and the split of the operands.

An operand pair belongs to the held-out sets when its larger number is 13 or more and a hash of the pair says
so (one in eight). Training text never shows such a pair, in either order and with any operator.
"""

from __future__ import annotations

from typing import NamedTuple

from nanochat.corpus.grammar import grammar
from nanochat.corpus.rng import Rng, mix

ONES = (
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Sum(NamedTuple):
    """An expression "a op b" and its value."""

    a: int
    op: str
    b: int

    @property
    def text(self) -> str:
        return f"{self.a} {self.op} {self.b}"

    @property
    def value(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair {a, b} is kept for the held-out sets."""
    low, high = min(a, b), max(a, b)
    return high >= 13 and mix(low, high, 4257) % 8 == 0


def draw_number(rng: Rng, max_digits: int) -> int:
    digits = (1, 2, 2, 2, 2, 3, 3, 3, 4, 4)[rng.below(10)]
    digits = min(digits, max_digits)
    return rng.between(2 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def draw_sum(rng: Rng, *, ops: str = "++--*", max_digits: int = 4, held_out: bool = False) -> Sum:
    """A random expression on one side of the split; no negative results, at most three digits for "*"."""
    op = rng.pick(ops)
    digits = min(max_digits, 3) if op == "*" else max_digits
    while True:
        a, b = draw_number(rng, digits), draw_number(rng, digits)
        if op == "-" and a <= b:
            a, b = b, a
        if is_held_out(a, b) == held_out and (op != "-" or a - b >= 2):
            return Sum(a, op, b)


def spoken(n: int) -> str:
    """A number below 1,000 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {spoken(n % 100)}" if n % 100 else "")


def question(rng: Rng, *, held_out: bool = False) -> tuple[str, Sum, str]:
    """(question, expression, answer) in training or in held-out phrasings, operands and stories."""
    g, new = grammar("numbers.txt"), "new." if held_out else ""
    kind = rng.below(10)
    names = {"name": rng.pick(grammar("stories.txt").lists["girl"]), "name2": rng.pick(["Tom", "Ben", "Sam"])}
    if kind < 3:
        s = draw_sum(rng, max_digits=3, held_out=held_out)
        tale = rng.pick(g.lists[f"{new}tale.{s.op}"])
    else:
        s = draw_sum(rng, held_out=held_out)
        tale = rng.pick(g.lists[f"{new}ask" if kind < 7 else f"{new}ask.{s.op}"])
    e = s.text
    if not held_out and kind == 3:  # other ways to write it; the tool call is always in the same form
        e = e.replace("*", "x") if s.op == "*" else e.replace(" ", "")
    slots = {"a": str(s.a), "b": str(s.b), "e": e, "r": str(s.value), **names}
    asked, _, answer = g.fill(tale, rng, slots).partition(" => ")
    return asked, s, answer or f"The answer is {s.value}."


def small_sum(rng: Rng) -> Sum:
    """A sum small enough to know by heart."""
    op = rng.pick("++-*")
    a, b = rng.between(1, 12), rng.between(1, 12)
    return Sum(max(a, b), op, min(a, b))


WORDS = {"+": "plus", "-": "minus", "*": "times"}


def document(rng: Rng) -> str:
    """Arithmetic in digits, in words, worked by tens and ones, or as word problems."""
    kind = rng.below(5)
    if kind == 0:
        lines = [f"{s.text} = {s.value}" for s in (small_sum(rng) for _ in range(12))]
        return "\n".join(lines)
    if kind == 1:
        some = [small_sum(rng) for _ in range(6)]
        said = [f"{spoken(s.a)} {WORDS[s.op]} {spoken(s.b)} is {spoken(s.value)}." for s in some]
        return " ".join(line[0].upper() + line[1:] for line in said)
    if kind == 2:
        return " ".join(worked_sum(rng) for _ in range(2))
    if kind == 3:
        lines = [f"{s.text} = {s.value}" for s in (draw_sum(rng) for _ in range(8))]
        return "\n".join(lines)
    told = [question(rng) for _ in range(3)]
    return "\n".join(f"Question: {q}\nCalculate: {s.text} = {s.value}\nAnswer: {a}" for q, s, a in told)


def worked_sum(rng: Rng) -> str:
    """A sum of two numbers below 100, first the tens, then the ones."""
    while True:
        a, b = rng.between(11, 89), rng.between(11, 89)
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        pairs = ((a, b), (a // 10 * 10, b // 10 * 10), (a % 10, b % 10), (tens, ones))
        if not any(is_held_out(x, y) for x, y in pairs):
            break
    return (f"What is {a} + {b}? First the tens: {a // 10 * 10} + {b // 10 * 10} = {tens}. "
            f"Then the ones: {a % 10} + {b % 10} = {ones}. Together: {tens} + {ones} = {a + b}. "
            f"So {a} + {b} = {a + b}.")  # fmt: skip
