"""Conversations to ids and masks, checked against the format spelled out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import chat_format as chat


class Letters:
    """A tokenizer whose ids are characters, so that what is rendered can be read."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_special(self, name: str) -> int:
        return -1 - chat.SPECIAL_TOKENS.index(name)


TOK = Letters()


def show(ids: list[int]) -> str:
    return "".join(chat.SPECIAL_TOKENS[-1 - i] if i < 0 else chr(i) for i in ids)


def said(ids: list[int], mask: list[int]) -> str:
    return show([i for i, bit in zip(ids, mask) if bit])


def talk(*messages: tuple[str, Any]) -> chat.Conversation:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


PARTS = [
    {"type": "text", "text": "So "},
    {"type": "python", "text": "6*7"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "42."},
]


def test_the_format() -> None:
    ids, mask = chat.render(
        talk(("user", "hi"), ("assistant", PARTS), ("user", "ok"), ("assistant", "bye")), TOK
    )
    assert show(ids) == (
        "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>So <|python_start|>6*7<|python_end|>"
        "<|output_start|>42<|output_end|>42.<|assistant_end|>"
        "<|user_start|>ok<|user_end|><|assistant_start|>bye<|assistant_end|>"
    )
    assert said(ids, mask) == "So <|python_start|>6*7<|python_end|>42.<|assistant_end|>bye<|assistant_end|>"
    assert len(ids) == len(mask) and set(mask) == {0, 1}


def test_the_special_tokens_stand_in_their_order() -> None:
    names = "bos user_start user_end assistant_start assistant_end python_start python_end output_start"
    assert [f"<|{name}|>" for name in [*names.split(), "output_end"]] == chat.SPECIAL_TOKENS


def test_a_system_message_is_merged_into_the_first_user_message() -> None:
    merged = chat.render(talk(("system", "Be kind."), ("user", "hi"), ("assistant", "yo")), TOK)
    assert merged == chat.render(talk(("user", "Be kind.\n\nhi"), ("assistant", "yo")), TOK)


def test_the_conversation_is_left_as_it_was() -> None:
    conversation = talk(("system", "s"), ("user", "u"), ("assistant", PARTS))
    before = repr(conversation)
    chat.render(conversation, TOK)
    chat.render_for_completion(conversation, TOK)
    assert repr(conversation) == before


def test_completion_ends_where_the_assistant_begins() -> None:
    asked = talk(("user", "a"), ("assistant", "b"), ("user", "c"))
    answered = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", PARTS))
    ids = chat.render_for_completion(answered, TOK)
    assert ids == chat.render_for_completion(asked, TOK)
    assert show(ids).endswith("<|assistant_end|><|user_start|>c<|user_end|><|assistant_start|>")
    assert chat.render(answered, TOK)[0][: len(ids)] == ids


roles = st.text(max_size=8)
parts = st.builds(dict, type=st.sampled_from(["text", "python", "python_output"]), text=roles)
turns = st.lists(st.tuples(roles, roles | st.lists(parts, max_size=4)), min_size=1, max_size=3)


@given(turns, st.integers(1, 60))
def test_truncation_is_a_prefix(turns: list[Any], max_tokens: int) -> None:
    conversation = talk(*(pair for user, answer in turns for pair in (("user", user), ("assistant", answer))))
    ids, mask = chat.render(conversation, TOK, None)
    assert chat.render(conversation, TOK, max_tokens) == (ids[:max_tokens], mask[:max_tokens])
    spoken = [
        part for _, answer in turns for part in chat.parts_of(answer) if part["type"] != "python_output"
    ]
    tags = len(turns) + 2 * sum(part["type"] == "python" for part in spoken)
    assert sum(mask) == tags + sum(len(part["text"]) for part in spoken)


def test_text_of() -> None:
    assert chat.text_of("plain") == "plain"
    assert chat.text_of(PARTS) == "So 42."


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "must be"),
        ({"messages": "hi"}, "must be"),
        (talk(), "must hold a user message"),
        (talk(("system", "s")), "must hold a user message"),
        (talk(("assistant", "a")), "message 0 must be of role 'user'"),
        (talk(("user", "a"), ("user", "b")), "message 1 must be of role 'assistant'"),
        (talk(("user", "a"), ("system", "b")), "message 1 must be of role 'assistant'"),
        (talk(("system", "a"), ("system", "b")), "message 1 must be of role 'user'"),
        (talk(("system", "a"), ("assistant", "b")), "message 1 must be of role 'user'"),
        ({"messages": ["hi"]}, "message 0 must have"),
        ({"messages": [{"role": "user"}]}, "message 0 must have"),
        (talk(("user", None)), "message 0: content must be a string or a list"),
        (talk(("user", PARTS)), "message 0: only an assistant"),
        (talk(("user", "a"), ("assistant", ["b"])), "message 1: a part must be"),
        (talk(("user", "a"), ("assistant", [{"type": "image", "text": "b"}])), "message 1: a part must be"),
        (talk(("user", "a"), ("assistant", [{"type": "text", "text": 1}])), "message 1: a part must be"),
    ],
)
def test_bad_conversations_are_named(conversation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.render(conversation, TOK)
    with pytest.raises(ValueError, match=message):
        chat.render_for_completion(conversation, TOK)


def test_given_parts_stand_in_the_answer_but_are_not_learned() -> None:
    parts = [{"type": "given", "text": "- a"}, {"type": "text", "text": "=B"}]
    asked = {"role": "user", "content": "?"}
    ids, mask = chat.render({"messages": [asked, {"role": "assistant", "content": parts}]}, TOK)
    told = [{"type": "text", "text": part["text"]} for part in parts]
    same, all_learned = chat.render({"messages": [asked, {"role": "assistant", "content": told}]}, TOK)
    assert ids == same and chat.text_of(parts) == "- a=B"
    given = len(TOK.encode("- a"))
    start = ids.index(TOK.encode_special(chat.ASSISTANT_START)) + 1
    assert (
        mask[start : start + given] == [0] * given and mask[start + given :] == all_learned[start + given :]
    )
