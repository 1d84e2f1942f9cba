"""The embedded corpus: the same bytes everywhere, true, clean, and disjoint from the held-out sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from functools import cache
from importlib import resources
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.chat_format import text_of
from nanochat.corpus import KINDS, choices, conversation, document, facts, letters, numbers
from nanochat.corpus.grammar import Grammar, article, grammar
from nanochat.corpus.heldout import as_conversation, heldout_sets
from nanochat.corpus.rng import Rng, mix_text
from nanochat.corpus.stories import story
from nanochat.engine.calculator import use_calculator
from tasks.custom import check_messages
from tasks.synthetic import Blind, has_word, heldout_lines

# What the generator gave when the held-out sets were made.
DIGEST = "686a8d3617a0d005b777e0ea0f59550d18751948f114e581985aa223e912955b"
NANOCHAT_MIXED = 0x5B076B6DDE40A774
NUM_DOCUMENTS = 6000
NUM_CONVERSATIONS = 800


@cache
def documents() -> tuple[str, ...]:
    return tuple(document(3, i) for i in range(NUM_DOCUMENTS))


@cache
def conversations() -> tuple[dict, ...]:
    return tuple(conversation(kind, 3, i) for kind in KINDS for i in range(NUM_CONVERSATIONS))


def everything(conv: dict) -> str:
    """All text of a conversation, tool calls too."""
    said = []
    for message in conv["messages"]:
        content = message["content"]
        said += [content] if isinstance(content, str) else [part["text"] for part in content]
    return "\n".join(said)


@cache
def training_text() -> str:
    return "\n".join([*documents(), *map(everything, conversations())])


def normal(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def test_same_bytes_everywhere() -> None:
    """A changed digest means a changed corpus: golden losses and held-out scores are then of another one."""
    made = [document(7, i) for i in range(300)]
    made += [json.dumps(conversation(kind, 7, i)) for kind in KINDS for i in range(40)]
    assert hashlib.sha256("\n".join(made).encode()).hexdigest() == DIGEST
    assert mix_text("nanochat") == NANOCHAT_MIXED


def test_random_access() -> None:
    forwards = [document(1, i) for i in range(50)]
    assert [document(1, i) for i in reversed(range(50))] == forwards[::-1]
    assert len(set(forwards) | {document(2, i) for i in range(50)}) > 95
    assert document(1, 2**40) != document(1, 2**40 + 1)


@given(st.integers(0, 2**64 - 1), st.integers(1, 1000))
def test_draws_stay_in_range(seed: int, n: int) -> None:
    rng = Rng(seed)
    assert all(0 <= rng.below(n) < n for _ in range(20))
    assert sorted(rng.sample(range(n), n)) == list(range(n))
    assert len(rng.sample(range(n), n // 2)) == n // 2


def test_weights_are_followed() -> None:
    rng = Rng(0)
    drawn = Counter(rng.weighted({"a": 1, "b": 3}) for _ in range(4000))
    assert 900 < drawn["a"] < 1100


def test_grammar_language() -> None:
    g = Grammar(
        ["@thing", "apple", "pear;of wood", "@@p", ". {^a thing} <is red|is red> {*thing}", "| no", "? x"]
    )
    assert g.fill("{^a thing} {thing.1} {other}", Rng(1), {"thing": "pear;of wood", "other": "o"}) == (
        "A pear of wood o"
    )
    told = {g.tell("p", Rng(i), {"thing": "apple"}) for i in range(40)}
    assert {"no", "no x"} < told
    assert told - {"no", "no x"} <= {
        f"An apple is red {t}{x}" for t in ("apple", "pear;of wood") for x in ("", " x")
    }
    assert (article("owl"), article("dog"), article("the Sun")) == ("an owl", "a dog", "the Sun")
    with pytest.raises(ValueError, match="a slot must look like"):
        g.fill("{Thing!}", Rng(0), {})


def test_text_is_clean() -> None:
    for text in (
        *documents()[:3000],
        *(text_of(m["content"]) for c in conversations() for m in c["messages"]),
    ):
        assert not re.search(r"[{}<>@]|  | [.,?!]|\.\.|=>|\?\.|[a-z]\.[A-Z]", text.replace("= ?", "")), text
        assert not re.search(
            r"(?<!letter )(?<!many )\b[Aa] (?!in\b)[aeio]|\b[Aa]n (?!hour)[b-df-hj-np-tv-z]", text
        ), text
        assert text == text.strip() and text


def line_of(text: str) -> dict[str, str]:
    """Entry -> letter of the list in a text."""
    return dict(re.findall(r"^- (.+)=([A-F])$", text, flags=re.M))


@pytest.mark.parametrize("kind", ["reorder", "lookup", "far_lookup", "quiz", "far_quiz"])
def test_lists_are_answered_with_the_letter_of_the_entry(kind: str) -> None:
    answers = {question: fact.answer for fact in facts.facts() for question in fact.questions}
    places = Counter()
    for i in range(500):
        messages = conversation(kind, 5, i)["messages"]
        marks = line_of(messages[0]["content"])
        assert len(set(marks.values())) == len(marks) >= 3
        if kind == "reorder":
            parts = messages[1]["content"]
            assert [part["type"] for part in parts] == ["given", "text"] * (len(parts) // 2)
            for given, learned in zip(parts[::2], parts[1::2]):
                assert learned["text"] == "=" + marks[given["text"].removeprefix("\n").removeprefix("- ")]
                places[learned["text"]] += 1
            continue
        for asked, answer in zip(messages[::2], messages[1::2]):
            text = re.sub(r"^- .+=[A-F]\n?", "", asked["content"], flags=re.M).removeprefix(choices.HEAD)
            named = [e for q, e in answers.items() if text.startswith(q)]
            if "lookup" in kind:
                named = [e for e in marks if has_word(text, [e])]
            assert answer["content"] in [marks[entry] for entry in named], messages
            places[answer["content"]] += 1
    assert max(places.values()) < 0.4 * sum(places.values()), "no letter may be a safe guess"


def test_every_fact_is_told_evenly() -> None:
    told = Counter(line for text in documents() for line in re.split(r"(?<=[.!?])\s+(?:- )?|\n(?:- )?", text))
    total = [sum(told[s] for s in {*fact.statements, fact.reply}) for fact in facts.facts()]
    assert 250 <= len(total) <= 330
    assert min(total) >= 8 and max(total) < 8 * sorted(total)[len(total) // 2]


def test_facts_are_well_formed() -> None:
    phrasings = Counter()
    for fact in facts.facts():
        assert has_word(fact.reply, [fact.answer]) and fact.answer == fact.accepted[0]
        assert len(fact.wrong) >= 3 and not set(fact.wrong) & set(fact.accepted)
        assert len(fact.statements) >= 6 and len(fact.questions) >= 5 and len(fact.new_questions) >= 3
        for question in (*fact.questions, *fact.new_questions):
            assert not has_word(question, fact.accepted), question
        assert not {normal(q) for q in fact.new_questions} & {normal(q) for q in fact.questions}
        phrasings.update(set(fact.questions))
    assert max(phrasings.values()) == 1, "a question must have one answer"


def test_choices() -> None:
    places = Counter()
    for conv in (conversation("choice", 3, i) for i in range(NUM_CONVERSATIONS)):
        for asked, answer in zip(conv["messages"][::2], conv["messages"][1::2]):
            if asked["content"].startswith(choices.HEAD):
                lines = re.findall(r"^- (.+)=([A-D])$", asked["content"], flags=re.M)
                assert len({choice for choice, _ in lines}) == 4 and "".join(c for _, c in lines) == "ABCD"
                places[answer["content"]] += 1
    assert set(places) == set("ABCD") and max(places.values()) < 1.2 * min(places.values())
    assert choices.render_multiple_choice("Why?", "AB", ["so", "no"]) == (
        "Multiple Choice question: Why?\n- so=A\n- no=B\n\n"
        "Respond only with the letter of the correct answer."
    )


def test_easy_choices_have_one_right_answer() -> None:
    for i in range(3000):
        asked, shown, place = choices.easy_question(Rng(9, i))
        kind = re.search(r" is (?:an?|a piece of) (\w+)\?$", asked)
        assert len(set(shown)) == len(shown) == 4
        if kind and kind.group(1) in letters.kinds():
            right = letters.kind_words(kind.group(1))
            assert [w in right for w in shown] == [i == place for i in range(4)]


def test_tool_outputs_are_what_the_tool_prints() -> None:
    num_calls = 0
    for conv in (*conversations(), *(as_conversation(r) for s in heldout_sets().values() for r in s)):
        for message in conv["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else []
            for code, output in pairwise(parts):
                if code["type"] == "python":
                    num_calls += 1
                    assert (output["type"], use_calculator(code["text"])) == ("python_output", output["text"])
    assert num_calls > 2 * NUM_CONVERSATIONS


def test_sums_in_documents_are_right() -> None:
    found = re.findall(r"(?<![\d*+-] )\b(\d+) ([-+*]) (\d+) = (\d+)", training_text())
    assert len(found) > 500
    for a, op, b, value in found:
        assert numbers.Sum(int(a), op, int(b)).value == int(value)


@given(st.integers(0, 999))
def test_spoken_numbers(n: int) -> None:
    ones = {word: i for i, word in enumerate(numbers.ONES)} | {
        w: 10 * i for i, w in enumerate(numbers.TENS) if w
    }
    head, _, rest = numbers.spoken(n).rpartition("hundred")
    words = rest.replace("and ", "").replace("-", " ").split()
    assert (ones[head.strip()] * 100 if head else 0) + sum(ones[w] for w in words) == n


def test_conversations_have_the_right_form() -> None:
    assert all(check_messages(conv["messages"]) is None for conv in conversations())
    with pytest.raises(ValueError, match="kind must be one of identity"):
        conversation("weather", 0, 0)


def test_stories_are_new() -> None:
    seen = {story(Rng(1, i)) for i in range(5000)}
    assert len(seen) == 5000
    assert not any(story(Rng(2, i)) in seen for i in range(500))


def test_heldout_files_are_what_the_generator_makes() -> None:
    for name, lines in heldout_lines().items():
        committed = (
            resources.files("tasks").joinpath("heldout").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
        )
        assert committed.splitlines() == lines
        assert len({json.loads(line)["question"] for line in lines}) == len(lines) >= 60


def test_no_heldout_question_in_the_training_text() -> None:
    text = normal(training_text())
    assert len(text) > 2_000_000
    asked = [record["question"] for records in heldout_sets().values() for record in records]
    asked += [record["question"] for record in Blind().records]
    assert [q for q in asked if normal(q) in text] == []


def test_no_heldout_phrasing_is_a_training_phrasing() -> None:
    for name in ("chats.txt", "numbers.txt"):
        lists = grammar(name).lists
        old = {normal(x) for key, lines in lists.items() if not key.startswith("new.") for x in lines}
        new = {normal(x) for key, lines in lists.items() if key.startswith("new.") for x in lines}
        assert new and not old & new


def test_operands_are_disjoint() -> None:
    shown = re.findall(r"(\d+) ?[-+*x] ?(\d+)", training_text())
    assert len(shown) > 2000 and not any(numbers.is_held_out(int(a), int(b)) for a, b in shown)
    spoken = re.findall(r"\b(\d+) (?:and|plus|minus|times|by|from) (\d+)\b", training_text())
    assert len(spoken) > 50 and not any(numbers.is_held_out(int(a), int(b)) for a, b in spoken)
    for record in heldout_sets()["arithmetic"]:
        a, _, b = record["code"].split()
        assert numbers.is_held_out(int(a), int(b)) and a in record["question"] and b in record["question"]
    rng = Rng(5)
    for _ in range(300):
        assert numbers.is_held_out(*(s := numbers.draw_sum(rng, held_out=True))[::2]) and s.value >= 0
    assert not any(numbers.is_held_out(a, b) for a in range(13) for b in range(13))


def test_heldout_words_are_never_shown() -> None:
    kept = set(letters.held_out_words())
    assert len(kept) == len(letters.held_out_words()) >= 200 and all(
        w.isascii() and w.isalpha() for w in kept
    )
    assert kept & set(re.findall(r"[a-z]+", training_text().lower())) == set()
    assert not kept & set(letters.training_words())


def test_heldout_questions_ask_what_is_taught() -> None:
    taught = {fact.reply for fact in facts.facts()}
    assert {record["reply"] for record in heldout_sets()["facts"]} <= taught
    for record in heldout_sets()["multiple_choice"]:
        right = record["choices"]["ABCD".index(record["reply"])]
        fact = next(f for f in facts.facts() if record["question"] in f.new_questions)
        assert fact.answer == right and set(record["choices"]) - {right} <= set(fact.wrong)
