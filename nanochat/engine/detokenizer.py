"""From token ids to text for people: parts, intact characters, stop strings.

One path for streamed and final text: pieces pushed one by one, joined, equal the whole. Special tokens are
never shown; they only say which part (text, python, python_output) the following tokens belong to.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from nanochat import chat_format as chat
from nanochat.protocols import Tokenizer

_PART_AFTER = {
    chat.PYTHON_START: "python",
    chat.PYTHON_END: "text",
    chat.OUTPUT_START: "python_output",
    chat.OUTPUT_END: "text",
}


class PartDecoder:
    """Token ids in, (part type, text) pieces out.

    Characters that are spread over tokens appear when their last byte has come; bytes that are no UTF-8
    become U+FFFD, at once when nothing can complete them.
    """

    def __init__(self, tok: Tokenizer) -> None:
        self._tok = tok
        self._part_after = {tok.encode_special(name): part for name, part in _PART_AFTER.items()}
        self._specials = {tok.encode_special(name) for name in tok.get_special_tokens()}
        self._part = "text"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> list[tuple[str, str]]:
        """The pieces that this token completes, none of them empty."""
        if token in self._part_after:
            pieces = self.flush()
            self._part = self._part_after[token]
            return pieces
        if token in self._specials:
            return []
        return self._pieces(self._utf8.decode(self._tok.decode_bytes([token])))

    def flush(self) -> list[tuple[str, str]]:
        """What is left: a character that was never completed."""
        return self._pieces(self._utf8.decode(b"", final=True))

    def _pieces(self, text: str) -> list[tuple[str, str]]:
        return [(self._part, text)] if text else []


def parts_of(ids: Iterable[int], tok: Tokenizer) -> list[dict[str, str]]:
    """The parts of an answer, as chat.py's conversations hold them: [{"type": "text", "text": "..."}, ...].

    A call of the tool is a part of its own, even when two follow each other.
    """
    decoder = PartDecoder(tok)
    starts = {tok.encode_special(name) for name in _PART_AFTER}
    parts: list[dict[str, str]] = []
    is_new = True
    for pieces, is_border in [*((decoder.push(i), i in starts) for i in ids), (decoder.flush(), False)]:
        for part, text in pieces:
            if is_new or parts[-1]["type"] != part:
                parts.append({"type": part, "text": ""})
            parts[-1]["text"] += text
            is_new = False
        is_new = is_new or is_border
    return parts


def answer_of(ids: Iterable[int], tok: Tokenizer) -> str:
    """The text parts of an answer joined, without tool code and outputs."""
    return "".join(part["text"] for part in parts_of(ids, tok) if part["type"] == "text")


# Terminals obey control characters, and a model may write any: only line ends and tabs pass.
_HARMLESS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def for_terminal(pieces: Iterable[tuple[str, str]]) -> Iterator[tuple[str, bool]]:
    """(text, is_tool) for the pieces of an answer; a call of the tool becomes [12 + 34 = 46]."""
    last = "text"
    for part, text in pieces:
        if part != last:
            joint = {"python": "[", "python_output": " = ", "text": "] "}[part]
            yield ("] [" if (last, part) == ("python_output", "python") else joint), True
            last = part
        yield text.translate(_HARMLESS), part != "text"
    if last != "text":
        yield "]", True


class StopFilter:
    """Ends a text at the first of several strings to be complete, however it is cut into pieces; the string
    itself (the longest, if two end together) is dropped. Holds back only what could still become one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """The text that can be shown now; nothing once a stop string has been met."""
        if self.is_hit:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            end, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            shown, self._held, self.is_hit = self._held[: end - len(stop)], "", True
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextStop:
    """Says when the text of a sequence, tool calls left out, holds one of several stop strings."""

    def __init__(self, tok: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self._filter = PartDecoder(tok), StopFilter(stops)

    def feed(self, token: int) -> bool:
        """Take the next token; True from the one on that completes a stop string."""
        for part, text in self._decoder.push(token):
            if part == "text":
                self._filter.push(text)
        return self._filter.is_hit
