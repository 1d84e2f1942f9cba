"""A conversation -> token ids, and which of them the model must learn to say. No torch, no files.

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|> <|user_start|> ...

What the assistant writes has mask 1 (text, python calls, the tokens that end them); what it is given has
mask 0 (the user, tool outputs, assistant_start, and the "given" parts of its own message: words put into its
mouth that it need not learn). Text is always encoded as ordinary text, so a special
string typed by a person stays text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

BOS = "<|bos|>"
USER_START, USER_END = "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
OUTPUT_START, OUTPUT_END = "<|output_start|>", "<|output_end|>"

# In the order of their ids, which are the last ones of the vocabulary.
SPECIAL_TOKENS = [BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END]
SPECIAL_TOKENS += [PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END]

# Part of an assistant message -> (its first token, its last token, the mask of all of it).
_PARTS = {
    "text": ("", "", 1),
    "given": ("", "", 0),
    "python": (PYTHON_START, PYTHON_END, 1),
    "python_output": (OUTPUT_START, OUTPUT_END, 0),
}

Conversation = dict[str, Any]
Rendered = tuple[list[int], list[int]]


class _Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def encode_special(self, name: str) -> int: ...


def text_of(content: str | list[dict[str, str]]) -> str:
    """The text of a message: the string itself, or its text parts joined (code and outputs left out)."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] in ("text", "given"))


def parts_of(content: Any) -> list[dict[str, str]]:
    """The content of a message as a list of {"type", "text"}. Raises ValueError for anything else."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"content must be a string or a list of parts, found {type(content).__name__}")
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") not in _PARTS
            or not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f'a part must be {{"type": one of {list(_PARTS)}, "text": a string}}, found {part!r:.80}'
            )
    return content


def turns(conversation: Conversation) -> list[tuple[str, list[dict[str, str]]]]:
    """(role, parts) of each message, user first, roles alternating, a system message merged into the first.

    Raises ValueError, naming the message, for a conversation that cannot be rendered.
    """
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("messages"), list):
        raise ValueError(f'a conversation must be {{"messages": [...]}}, found {conversation!r:.80}')
    result: list[tuple[str, list[dict[str, str]]]] = []
    system = None
    for index, message in enumerate(conversation["messages"]):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f'message {index} must have "role" and "content", found {message!r:.80}')
        role = message["role"]
        try:
            parts = parts_of(message["content"])
        except ValueError as error:
            raise ValueError(f"message {index}: {error}") from None
        if role != "assistant" and any(part["type"] != "text" for part in parts):
            raise ValueError(
                f"message {index}: only an assistant may have python parts, found one of {role!r}"
            )
        if role == "system" and index == 0:
            system = text_of(parts)
            continue
        expected = "assistant" if len(result) % 2 else "user"
        if role != expected:
            raise ValueError(
                f"message {index} must be of role {expected!r} (roles alternate), found {role!r}"
            )
        if system is not None and not result:
            parts = [{"type": "text", "text": f"{system}\n\n{text_of(parts)}"}]
        result.append((role, parts))
    if not result:
        raise ValueError("a conversation must hold a user message, found none")
    return result


def render(conversation: Conversation, tok: _Tokenizer, max_tokens: int | None = 2048) -> Rendered:
    """(ids, mask) of a conversation, cut to `max_tokens`; mask 1 marks the tokens the assistant must say."""
    return _render(turns(conversation), tok, max_tokens)


def render_for_completion(conversation: Conversation, tok: _Tokenizer) -> list[int]:
    """The ids a model continues: without the last assistant message, ending with assistant_start."""
    messages = turns(conversation)
    if messages[-1][0] == "assistant":
        messages.pop()
    return [*_render(messages, tok, None)[0], tok.encode_special(ASSISTANT_START)]


def _render(
    messages: list[tuple[str, list[dict[str, str]]]], tok: _Tokenizer, max_tokens: int | None
) -> Rendered:
    ids, mask = [tok.encode_special(BOS)], [0]

    def say(new: list[int], bit: int) -> None:
        ids.extend(new)
        mask.extend([bit] * len(new))

    for role, parts in messages:
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        if role == "user":
            say(
                [tok.encode_special(USER_START), *tok.encode(text_of(parts)), tok.encode_special(USER_END)], 0
            )
            continue
        say([tok.encode_special(ASSISTANT_START)], 0)
        for part in parts:
            start, end, bit = _PARTS[part["type"]]
            body = tok.encode(part["text"])
            say([tok.encode_special(start), *body, tok.encode_special(end)] if start else body, bit)
        say([tok.encode_special(ASSISTANT_END)], 1)
    return ids[:max_tokens], mask[:max_tokens]
