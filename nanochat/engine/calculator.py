"""The python tool: a calculator for text that a model wrote, and the state it needs in one sequence.

The text is split into tokens of a tiny language first, so that Python's parser never sees anything else; then
its syntax tree is walked. Nothing is evaluated by Python itself, no clock or thread is involved, and the size
of every number is predicted before it is computed, so the answer is the same everywhere and comes at once.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from nanochat import chat_format as chat
from nanochat.protocols import Tokenizer

MAX_CHARS = 256
MAX_NODES = 64
MAX_DEPTH = 32
MAX_BITS = 4096
MAX_EXPONENT = 1024
MAX_RESULT_CHARS = 64
MAX_ARGUMENTS = 8
MAX_ROUND_DIGITS = 64  # round(1, -10**9) would build a number of a billion digits

Number = int | float

METHODS = ("count", "find", "startswith", "endswith", "upper", "lower")
FUNCTIONS = ("len", "abs", "round", "min", "max")

_TOKEN = re.compile(
    r"""(?P<string> '[^'\\\0]*' | "[^"\\\0]*" )
    | (?P<number> (?: [0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9]) | [0-9]+(?:_[0-9]+)* )  # 1,234 or 1234 or 1_234
        (?:\.[0-9]*)? (?:[eE][-+]?[0-9]+)? (?![0-9A-Za-z_])
        | \.[0-9]+ (?:[eE][-+]?[0-9]+)? (?![0-9A-Za-z_]) )
    | (?P<name> [a-z]+ )
    | (?P<open> \( ) | (?P<close> \) )
    | (?P<other> \*\* | // | [-+*/%,.] | [ ]+ )""",
    re.VERBOSE,
)

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Refused(Exception):
    pass


def use_calculator(text: str) -> str | None:
    """The value of an expression as text, or None when it is refused; never raises.

    >>> use_calculator("1,200 * 3"), use_calculator("'strawberry'.count('r')"), use_calculator("2 ** 0.5")
    ('3600', '3', '1.4142135623730951')

    Numbers with + - * / // % **, the methods of a string literal in METHODS, and FUNCTIONS. Commas between
    thousands are dropped, except in strings and between the arguments of a call: max(100,200) is 200.
    """
    try:
        tree = ast.parse(_only_our_language(text), mode="eval").body
        nodes = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
        return _show(_value(tree, 1)) if nodes <= MAX_NODES else None
    except (_Refused, SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def _only_our_language(text: str) -> str:
    if not isinstance(text, str) or len(text) > MAX_CHARS:
        raise _Refused
    text = text.strip()
    pieces: list[str] = []
    in_call: list[bool] = [False]  # one entry per open parenthesis
    position, last = 0, ""
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Refused
        kind, piece = str(match.lastgroup), match.group()
        if kind == "number" and not in_call[-1]:
            piece = piece.replace(",", "")
        elif kind == "name" and piece not in METHODS and piece not in FUNCTIONS:
            raise _Refused
        elif kind == "open":
            in_call.append(last == "name")
        elif kind == "close" and len(in_call) > 1:
            in_call.pop()
        if not piece.isspace():
            last = kind
        pieces.append(piece)
        position = match.end()
    return "".join(pieces)


def _value(node: ast.expr, depth: int) -> Number | bool | str:
    if depth > MAX_DEPTH:
        raise _Refused
    if isinstance(node, ast.Call):
        return _call(node, depth)
    return _number(node, depth)


def _number(node: ast.expr, depth: int) -> Number:
    """The value of a node that must be a number (a truth value is none)."""
    if depth > MAX_DEPTH:
        raise _Refused
    if isinstance(node, ast.Constant):
        value: Any = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _number(node.operand, depth + 1)
        value = -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.BinOp):
        value = _binary(node.op, _number(node.left, depth + 1), _number(node.right, depth + 1))
    elif isinstance(node, ast.Call):
        value = _call(node, depth)
    else:
        raise _Refused
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= MAX_BITS:
        return value
    raise _Refused


def _binary(op: ast.operator, a: Number, b: Number) -> Any:
    if isinstance(op, ast.Pow):
        return _power(a, b)
    if isinstance(a, int) and isinstance(b, int):
        bits_a, bits_b = a.bit_length(), b.bit_length()
        bits = bits_a + bits_b if isinstance(op, ast.Mult) else max(bits_a, bits_b) + 1
        if bits > MAX_BITS:
            raise _Refused
    if type(op) not in _OPERATORS:
        raise _Refused
    return _OPERATORS[type(op)](a, b)


def _power(a: Number, b: Number) -> Any:
    if isinstance(a, int) and isinstance(b, int) and 0 <= b <= MAX_EXPONENT:
        if a.bit_length() * b > MAX_BITS:
            raise _Refused
        return a**b
    return float(a) ** float(b)  # complex for a root of a negative number, which _number refuses


def _call(node: ast.Call, depth: int) -> Number | bool | str:
    if node.keywords:
        raise _Refused
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr in METHODS:
        return _method(_string(function.value), function.attr, node.args)
    if not isinstance(function, ast.Name) or function.id not in FUNCTIONS:
        raise _Refused
    if function.id == "len":
        (argument,) = node.args
        return len(_string(argument))
    if len(node.args) > MAX_ARGUMENTS:
        raise _Refused
    numbers = [_number(argument, depth + 1) for argument in node.args]
    if function.id == "abs":
        (number,) = numbers
        return abs(number)
    if function.id == "round":
        number, *rest = numbers
        if not rest:
            return round(number)
        (digits,) = rest
        if not isinstance(digits, int) or abs(digits) > MAX_ROUND_DIGITS:
            raise _Refused
        return round(number, digits)
    if len(numbers) < 2:
        raise _Refused
    return min(numbers) if function.id == "min" else max(numbers)


def _method(text: str, name: str, arguments: list[ast.expr]) -> int | bool | str:
    if name in ("upper", "lower"):
        if arguments:
            raise _Refused
        return text.upper() if name == "upper" else text.lower()
    part = _string(arguments[0]) if arguments else None
    bounds = [a.value for a in arguments[1:] if isinstance(a, ast.Constant) and type(a.value) is int]
    if part is None or len(bounds) != len(arguments) - 1 or len(bounds) > 2:
        raise _Refused
    result: int | bool = getattr(text, name)(part, *bounds)
    return result


def _string(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise _Refused


def _show(value: Number | bool | str) -> str | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    text = str(value)
    return text if len(text) <= MAX_RESULT_CHARS else None


class ToolState:
    """The python tool of one sequence: collects code, answers with the tokens to force."""

    def __init__(self, tok: Tokenizer) -> None:
        self._tok = tok
        self._start = tok.encode_special(chat.PYTHON_START)
        self._end = tok.encode_special(chat.PYTHON_END)
        self._code: list[int] | None = None

    def feed(self, token: int) -> list[int]:
        """Take a sampled token; returns the tokens to force: none unless it ended code that has a value.

        They are the value as ordinary text between <|output_start|> and <|output_end|>.
        """
        if token == self._start:
            self._code = []
        elif token != self._end:
            if self._code is not None:
                self._code.append(token)
        elif self._code is not None:
            result = use_calculator(self._tok.decode(self._code))
            self._code = None
            if result:
                special = self._tok.encode_special
                return [special(chat.OUTPUT_START), *self._tok.encode(result), special(chat.OUTPUT_END)]
        return []
