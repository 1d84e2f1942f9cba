"""The calculator against exact arithmetic, against escapes, and against the clock; the tool's states."""

import threading
import time
import tracemalloc
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine.calculator import MAX_BITS, ToolState, use_calculator

VALUES = {
    "12 + 34": "46",
    "1,234 * 2": "2468",
    "1,234,567.5 - 0.5": "1234567",
    "6 / 3": "2",
    "7 / 2": "3.5",
    "-7 // 2": "-4",
    "-7 % 3": "2",
    "2 ** 10": "1024",
    "2 ** -1": "0.5",
    "1 ** 5000": "1",
    "2 ** 1000 % 7": "2",
    "--3": "3",
    "0.1 + 0.2": "0.30000000000000004",
    "1e16": "1e+16",
    ".5 + 5.": "5.5",
    "'strawberry'.count('r')": "3",
    '"it\'s".find("\'")': "2",
    "'banana'.count('a', 2, 4)": "1",
    "'abc'.startswith('a')": "True",
    "'abc'.upper()": "ABC",
    "'naïve'.count('ï')": "1",
    "len('hello')": "5",
    "len('a') + abs(-2)": "3",
    "round(2.567, 1)": "2.6",
    "round(7 / 2)": "4",
    "max(1, 2.5, 2)": "2.5",
    "  1 + 1  ": "2",
}

REFUSED = [
    *(
        "",
        " ",
        "1 +",
        "(1",
        "1)",
        "1, 2",
        "1,23",
        "1,2345",
        "12,34,567",
        "007",
        "1 2",
        "\x00",
        "1\n+1",
        "1 = 1",
    ),
    *(
        "1 / 0",
        "1 // 0",
        "1 % 0",
        "0 ** -1",
        "1e999",
        "1e308 * 10",
        "(-8) ** 0.5",
        "2 ** 5000",
        "10.0 ** 400",
    ),
    *("9 ** 9 ** 9", "2 ** 1025 * 0", "1j", "True", "None", "...", "nan", "inf", "pi", "x", "e"),
    *(
        "1 if 1 else 2",
        "1if 1else 2",
        "1 < 2",
        "1 and 2",
        "not 1",
        "1 << 2",
        "1 & 2",
        "~1",
        "1 @ 1",
        "(x := 1)",
    ),
    *(
        "[1]",
        "(1, 2)",
        "{1}",
        "{}",
        "[i for i in 'a']",
        "'abc'[0]",
        "lambda: 1",
        "f'{1}'",
        "b'a'",
        "u'a'",
        "r'a'",
    ),
    *("'a'", "'a' + 'b'", "'a' * 9", "'%s' % 1", "'a'.zfill(99)", "'a'.replace('a', 'b')", "'a'.join('b')"),
    *(
        "'a'.count",
        "'a'.count()",
        "'a'.count(1)",
        "'a'.count('a', 'b')",
        "'a'.count('a', -1)",
        "'a'.upper('b')",
    ),
    *("'a'.upper().lower()", "'\\x41'.lower()", "'a'.__class__", "(1).real", "'a'.startswith(('a',))"),
    *(
        "'a'.count(sub='a')",
        "'a'.count(*'a')",
        "len(1)",
        "len('a', 'b')",
        "abs()",
        "abs('a')",
        "max(1)",
        "max('a', 'b')",
    ),
    *("max(1,2,3,4,5,6,7,8,9)", "round(1, -1000000000)", "round(1, 2, 3)", "round(1.5, 1.0)", "min([1])"),
    *(
        "__import__('os')",
        "eval('1')",
        "open('f')",
        "print(1)",
        "exec('1')",
        "len(len)",
        "abs(abs)",
        "(abs)(1)()",
    ),
    *(
        "'a'.startswith('a') + 1",
        "-'a'.startswith('a')",
        "max(1, 'a'.endswith('a'))",
        "１ + １",
        "1 + \u202e1",
        "\ud800",
    ),
    *(
        "1+" * 40 + "1",
        "-" * 40 + "1",
        "(" * 300,
        "9" * 300,
        "1 " * 200,
        "2 ** 300",
        "await 1",
        "yield",
        "a.b.c",
    ),
]


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    assert use_calculator(text) == VALUES[text]


def test_sixty_escapes() -> None:
    assert len(REFUSED) >= 60
    assert [text for text in REFUSED if use_calculator(text) is not None] == []
    assert use_calculator(None) is None  # type: ignore[arg-type]


def test_commas_in_strings_and_calls() -> None:
    assert use_calculator("'1,234,567'.count(',')") == "2"
    assert use_calculator("max(100,200)") == "200"
    assert use_calculator("max((1,200),300)") == "1200"
    assert use_calculator("(1,200)") == "1200"


def expressions() -> st.SearchStrategy:
    """Pairs of an expression's text and its exact value (None where it divides by zero)."""
    leaf = st.integers(0, 10**6).map(lambda n: (f"{n:,}", Fraction(n)))

    def extend(inner: st.SearchStrategy) -> st.SearchStrategy:
        binary = st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner)
        return st.one_of(
            binary.map(combine),
            inner.map(lambda pair: (f"-({pair[0]})", None if pair[1] is None else -pair[1])),
        )

    def combine(parts: tuple) -> tuple:
        (left, a), op, (right, b) = parts
        text = f"({left}) {op} ({right})"
        if a is None or b is None or (op in ("//", "%") and b == 0):
            return text, None
        exact = {"+": a + b, "-": a - b, "*": a * b}
        return text, exact[op] if op in exact else Fraction(a // b if op == "//" else a % b)

    return st.recursive(leaf, extend, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_fuzz_vs_fractions(pair: tuple) -> None:
    text, exact = pair
    wanted = None if exact is None or len(text) > 256 or len(str(exact)) > 64 else str(exact)
    assert use_calculator(text) == wanted


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.,+-*/%() '\"aclnoumtex_**\\\n\u00e9", max_size=60))
def test_never_raises_and_stays_short(text: str) -> None:
    result = use_calculator(text)
    assert result is None or len(result) <= 64


def test_time_and_memory_bound() -> None:
    worst = [
        *(
            "9 ** 9 ** 9 ** 9",
            "2 ** 1024 * 2 ** 1024",
            "round(1, -10**9)",
            "1e308 ** 1e308",
            "9" * 256,
            "(" * 256,
        ),
        *("7 ** 1024 % 10", "+".join(["2**1023"] * 32), "'" + "a" * 250 + "'.count('a')", "(2**1023)**3 % 5"),
    ]
    for text in worst:
        use_calculator(text)  # the first call of a kind may load things
        times = []
        for _ in range(5):
            start = time.perf_counter()
            use_calculator(text)
            times.append(time.perf_counter() - start)
        tracemalloc.start()
        use_calculator(text)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert min(times) < 0.005, text
        assert peak < 2**20, text


def test_sizes_are_predicted() -> None:
    assert use_calculator(f"2 ** 1023 % {2**10}") == "0"
    assert MAX_BITS == 4096
    assert use_calculator("(2 ** 1023) ** 3 % 7") is not None  # 1024 bits * 3
    assert use_calculator("(2 ** 1023) ** 4 % 7") == "1"  # 4096
    assert use_calculator("(2 ** 1023) ** 4 * 4 % 7") == "4"  # 4093 + 3 bits
    assert use_calculator("(2 ** 1023) ** 4 * 8 % 7") is None  # 4093 + 4
    assert use_calculator("(2 ** 1023) ** 5 % 7") is None


def test_same_in_any_thread() -> None:
    found: list[list[str | None]] = []
    texts = [*VALUES, *REFUSED]
    threads = [
        threading.Thread(target=lambda: found.append([use_calculator(t) for t in texts])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[use_calculator(t) for t in texts]] * 4


class Letters:
    """A tokenizer of one token per character; specials from 1000 on."""

    names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

    def encode_special(self, name: str) -> int:
        return 1000 + self.names.index(name)

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_tool_state() -> None:
    tok = Letters()
    start, end, out_start, out_end = (tok.encode_special(name) for name in tok.names)

    def forced(*tokens: int) -> list[list[int]]:
        state = ToolState(tok)
        return [answer for token in tokens if (answer := state.feed(token))]

    code = tok.encode("12+34")
    assert forced(start, *code, end) == [[out_start, *tok.encode("46"), out_end]]
    assert forced(*code, end) == []  # never opened
    assert forced(start, *code) == []  # never closed
    assert forced(start, *tok.encode("1/0"), end) == []  # refused: nothing is forced
    assert forced(start, *tok.encode("9"), start, *code, end, end) == [
        [out_start, *tok.encode("46"), out_end]
    ]
    assert forced(*(start, *code, end) * 2) == [[out_start, *tok.encode("46"), out_end]] * 2
