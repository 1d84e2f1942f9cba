"""What passes between the two processes of grading: literals in frames of at most 64 KiB.

Only values of builtin types cross, by value, to a bounded depth; tuples stay tuples. A subclass is sent as
the builtin it stands on, so that no foreign method comes along. A frame is a length (4 bytes) and JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

MAX_FRAME, MAX_DEPTH = 1 << 16, 32
SMALL = 1 << 53  # integers below it are JSON numbers; others hexadecimal text
_MANY = {list: "l", tuple: "t", set: "e", frozenset: "z"}
_MAKE: dict[Any, Any] = {"l": list, "t": tuple, "e": set, "z": frozenset}


def pack(value: Any, depth: int = 0) -> Any:
    """A literal as JSON values. Raises TypeError for anything else, ValueError for one that is too deep.

    >>> pack((1, "a", [None, 2.5]))
    ['t', [['i', 1], ['s', 'a'], ['l', [None, ['f', '0x1.4000000000000p+1']]]]]
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return ["i", number] if -SMALL < number < SMALL else ["h", hex(number)]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, complex):
        return ["c", [float.hex(value.real), float.hex(value.imag)]]
    if isinstance(value, str):
        return ["s", str.__str__(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, dict):
        return ["d", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in dict.items(value)]]
    for kind, name in _MANY.items():
        if isinstance(value, kind):
            return [name, [pack(item, depth + 1) for item in kind.__iter__(value)]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent")


def unpack(packed: Any, depth: int = 0) -> Any:
    """The inverse of `pack`. Raises ValueError for anything that pack does not make."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if packed is None or packed is True or packed is False:
        return packed
    if not (isinstance(packed, list) and len(packed) == 2 and isinstance(packed[0], str)):
        raise ValueError("not a literal")
    name, body = packed
    try:
        if name == "i" and type(body) is int:
            return body
        if name == "h" and type(body) is str:
            return int(body, 16)
        if name == "f" and type(body) is str:
            return float.fromhex(body)
        if name == "c":
            return complex(*map(float.fromhex, body))
        if name == "s" and type(body) is str:
            return body
        if name == "b":
            return bytes.fromhex(body)
        if name == "d":
            return {unpack(k, depth + 1): unpack(v, depth + 1) for k, v in body}
        if name in _MAKE:
            return _MAKE[name](unpack(item, depth + 1) for item in body)
    except (TypeError, OverflowError) as error:  # unhashable, wrong shapes
        raise ValueError(str(error)) from error
    raise ValueError("not a literal")


def frame(message: dict[str, Any]) -> bytes:
    """A message as bytes. Raises ValueError if it is too large."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"more than {MAX_FRAME} bytes")
    return len(body).to_bytes(4, "little") + body


def split(data: bytes) -> tuple[dict[str, Any] | None, bytes]:
    """(first message or None if it is not complete, the rest). ValueError for what is no message."""
    size = int.from_bytes(data[:4], "little")
    if len(data) >= 4 and size > MAX_FRAME:
        raise ValueError("a frame is too large")
    if len(data) < 4 + size or len(data) < 4:
        return None, data
    try:
        message = json.loads(data[4 : 4 + size])
    except (ValueError, RecursionError) as error:
        raise ValueError("a frame is no JSON") from error
    if not isinstance(message, dict):
        raise ValueError("a frame holds no message")
    return message, data[4 + size :]


def read_message(fd: int, limit: int = MAX_FRAME) -> dict[str, Any]:
    """The next message of a descriptor. EOFError at its end."""
    size = int.from_bytes(_read(fd, 4), "little")
    if size > limit:
        raise ValueError("a frame is too large")
    found: dict[str, Any] = json.loads(_read(fd, size))
    return found


def send(fd: int, message: dict[str, Any]) -> None:
    """Write a message whole."""
    data = frame(message)
    while data:
        data = data[os.write(fd, data) :]


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
