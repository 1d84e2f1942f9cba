"""Tasks: slices, mixtures, grading, and reading rows as the hub's data sets have them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.number_tasks import Numbers, said
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.home import Home
from tasks.arc import ARC
from tasks.base import Curriculum, Mixture, reference
from tasks.custom import CustomJSON
from tasks.eval_tasks import open_tasks
from tasks.gsm8k import GSM8K, solution_parts
from tasks.mixtures import (
    LESSONS,
    NUM_SMOKE,
    PRESETS,
    STAGES,
    english_words,
    mixture,
    primer,
    synthetic_mixture,
)
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee
from tasks.synthetic import Blind, SyntheticChat, has_word, heldout_tasks, last_number, words


@given(st.integers(0, 30), st.integers(0, 40), st.none() | st.integers(0, 40), st.integers(1, 7))
def test_slices_are_python_slices(count: int, start: int, more: int | None, step: int) -> None:
    stop = None if more is None else start + more
    task = Numbers(count, start=start, stop=stop, step=step)
    assert said(task) == list(range(count))[start:stop:step] and len(task) == len(said(task))


@pytest.mark.parametrize("bad", [{"start": -1}, {"start": 3, "stop": 2}, {"step": 0}])
def test_bad_slices(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        Numbers(9, **bad)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), max_size=4), st.integers(0, 5))
def test_mixture_holds_every_example_as_often_as_asked(parts: list[tuple[int, int]], seed: int) -> None:
    tasks = [(Numbers(count, 100 * i), times) for i, (count, times) in enumerate(parts)]
    mixed = Mixture(tasks, seed)
    wanted = Counter({100 * i + j: times for i, (count, times) in enumerate(parts) for j in range(count)})
    assert Counter(said(mixed)) == wanted and said(Mixture(tasks, seed)) == said(mixed)


def test_mixture_is_shuffled_and_slices_count() -> None:
    mixed = said(Mixture([Numbers(50), Numbers(50, 100, start=40)]))
    assert sorted(mixed) == [*range(50), *range(140, 150)] != mixed != said(Mixture([Numbers(60)], 1))


def test_training_sets_have_no_grade() -> None:
    with pytest.raises(ValueError, match="training set"):
        Numbers(1).evaluate(Numbers(1)[0], "0")


@pytest.mark.parametrize("name", ["arithmetic", "letters", "facts", "multiple_choice", "identity"])
def test_heldout_sets_accept_the_reference_and_nothing_else(name: str) -> None:
    task = heldout_tasks()[name]
    assert len(task) == (80 if name == "identity" else 200) and task.name == name
    for conv in task:
        assert task.evaluate(conv, reference(conv)) and task.reward(conv, reference(conv)) == 1.0
        assert not any(
            task.evaluate(conv, wrong) for wrong in ("", "I do not know.", "E", "-1", "1000000007")
        )
    others = [reference(conv) for conv in task]
    if name != "identity":
        right = sum(task.evaluate(conv, other) for conv, other in zip(task, others[1:]))
        assert right < {"letters": 100, "multiple_choice": 80}.get(name, 12)


def test_blind_questions_are_judged_by_their_kind() -> None:
    task, judged = Blind(), Counter(r["kind"] for r in Blind().records)
    assert len(task) == 166 and set(judged) == set(Blind.judges) and "blind" not in heldout_tasks()
    for conv in task:
        right = " ".join(group[0] for group in conv["required"]) if "required" in conv else reference(conv)
        assert task.evaluate(conv, right) and not task.evaluate(conv, "I do not know.")
    assert set(open_tasks("blind", {}, Home(Path("unused")))) == {"blind"}


def test_reading_answers() -> None:
    assert [last_number(t) for t in ("The answer is 1,007.", "3 - 5 is -2", "x2 none", "4 or 5!", "0.5")] == [
        "1007", "-2", None, "5", "0.5",
    ]  # fmt: skip
    assert has_word("It is New  Delhi!", ["new delhi"]) and not has_word("a goldfish", ["gold"])
    assert words("A-b, C_d") == " a b c d "


def test_synthetic_chat() -> None:
    task = SyntheticChat("identity", 20, seed=1)
    assert (
        len(task) == 20
        and task[3] == SyntheticChat("identity", 5, seed=1)[3] != SyntheticChat("identity", 5)[3]
    )
    with pytest.raises(ValueError, match="kind must be one of"):
        SyntheticChat("nothing", 1)[0]


def test_mixtures_of_the_embedded_corpus() -> None:
    assert {sum(kinds.values()) for lessons in LESSONS.values() for _, kinds in lessons} == {100}
    for stage in STAGES:
        mixed = mixture(stage, "smoke")
        assert abs(len(mixed) - NUM_SMOKE[stage]) < 20 and mixed[7]["messages"][-1]["role"] == "assistant"
        assert abs(len(synthetic_mixture(stage, 1, 1000)) - 1000) < 20
    lessons = primer("smoke")
    assert isinstance(lessons, Curriculum) and lessons.ends[-1] == len(lessons)
    first_lesson = [lessons[i] for i in range(lessons.ends[0])]
    assert all(isinstance(conv["messages"][1]["content"], list) for conv in first_lesson), "in order"
    with pytest.raises(UserError, match="a primer is one of smoke, cpu-demo"):
        primer("speedrun")
    first = {json.dumps(conv) for conv in mixture("mid", "smoke")}
    assert sum(json.dumps(conv) in first for conv in mixture("sft", "smoke")) < 60, (
        "only the short ones repeat"
    )
    with pytest.raises(ValueError, match="stage must be one of"):
        mixture("base", PRESETS[0])


# ---- the hub's data sets, in small

GSM8K_ROW = {"question": "Six and one?", "answer": "6+1 = <<6+1=7>>7 and 1,0 <<7*3=21>>21\n#### 1,021"}
MMLU_ROW = {"question": "Why?", "subject": "logic", "choices": ["a", "b", "c", "d"], "answer": 2}
ARC_ROWS = [
    {"question": "One?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    {"question": "Two?", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
]
TALK = [{"content": "Be kind.", "role": "system"}, {"content": "Hi", "role": "user"},
        {"content": "Hello", "role": "assistant"}]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror with a few rows of every data set."""
    files: dict[str, list[dict[str, Any]]] = {
        "openai/gsm8k/main/train-00000-of-00001.parquet": [GSM8K_ROW],
        "openai/gsm8k/main/test-00000-of-00001.parquet": [
            {**GSM8K_ROW, "question": str(i)} for i in range(40)
        ],
        "cais/mmlu/all/auxiliary_train-00000-of-00001.parquet": [MMLU_ROW],
        "cais/mmlu/all/test-00000-of-00002.parquet": [MMLU_ROW],
        "cais/mmlu/all/test-00001-of-00002.parquet": [MMLU_ROW, MMLU_ROW],
        "allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet": ARC_ROWS,
        "HuggingFaceTB/smol-smoltalk/data/train-00000-of-00001.parquet": [{"messages": TALK, "source": "us"}],
        "HuggingFaceTB/smol-smoltalk/data/test-00000-of-00001.parquet": [{"messages": TALK[:2]}],
    }
    for name, rows in files.items():
        path = tmp_path / "mirror" / "datasets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    words_file = tmp_path / "mirror" / "words" / "words_alpha.txt"
    words_file.parent.mkdir()
    words_file.write_text("cat\r\nbee\r\n")
    monkeypatch.setenv("NANOCHAT_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOCHAT_HOME", str(tmp_path / "home"))
    return tmp_path


def test_gsm8k(hub: Path) -> None:
    conv = GSM8K("train")[0]
    assert conv["messages"][1]["content"] == [
        {"type": "text", "text": "6+1 = "},
        {"type": "python", "text": "6+1"},
        {"type": "python_output", "text": "7"},
        {"type": "text", "text": "7 and 1,0 "},
        {"type": "python", "text": "7*3"},
        {"type": "python_output", "text": "21"},
        {"type": "text", "text": "21\n#### 1,021"},
    ]
    assert solution_parts("<<a=b=c>>")[0] == {"type": "python", "text": "a=b"}
    task = GSM8K("test")
    assert task.evaluate(conv, "so #### 1021 and #### 7") and task.evaluate(conv, "#### 1,021")
    assert not task.evaluate(conv, "1021") and not task.evaluate(conv, "#### 102")
    order = [conv["messages"][0]["content"] for conv in task]
    assert sorted(order, key=int) == [str(i) for i in range(40)] != order
    assert order == [conv["messages"][0]["content"] for conv in GSM8K("test", Home(hub / "other"))]


def test_mmlu_over_several_files(hub: Path) -> None:
    task = MMLU("test")
    assert len(task) == 3 and len(MMLU("test", start=1)) == 2 and task.kind == "categorical"
    assert task[0]["messages"][0]["content"] == (
        "Multiple Choice question: Why?\n- a=A\n- b=B\n- c=C\n- d=D\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert task.evaluate(task[0], "C") and not task.evaluate(task[0], "B")
    assert task[0]["letters"] == ["A", "B", "C", "D"] and task[0]["subject"] == "logic"


def test_arc_labels_may_be_digits(hub: Path) -> None:
    found = {conv["messages"][0]["content"].split("\n")[0][-4:]: conv for conv in ARC("ARC-Easy", "test")}
    assert {key: (reference(c), c["letters"]) for key, c in found.items()} == {
        "One?": ("B", list("ABC")),
        "Two?": ("E", list("ABCDE")),
    }


def test_smoltalk(hub: Path) -> None:
    assert SmolTalk("train")[0] == {"messages": [{"role": m["role"], "content": m["content"]} for m in TALK]}
    with pytest.raises(ValueError, match=r"row 0 of .*smol-smoltalk.*must alternate"):
        SmolTalk("test")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_hub_mixture(hub: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert english_words() == ["cat", "bee"]
    mixed = mixture(stage, "speedrun")
    names = Counter(task.name for task in mixed.tasks)
    times = (3, 4) if stage == "sft" else (1, 1)
    assert names == {
        "smoltalk": 1, "mmlu": times[0], "gsm8k": times[1], "synthetic-identity": 2,
        "simple-spelling": 1, "spelling-bee": 1,
    }  # fmt: skip
    assert len(mixed) == 1 + sum(times) + 2000 + 280_000


def test_bad_splits_and_files(hub: Path) -> None:
    for make in (
        lambda: GSM8K("dev"),
        lambda: MMLU("train"),
        lambda: ARC("Easy", "test"),
        lambda: SmolTalk("x"),
    ):
        with pytest.raises(ValueError, match="found"):
            make()
    pq.write_table(
        pa.table({"question": ["?"]}), hub / "mirror/datasets/cais/mmlu/all/dev-00000-of-00001.parquet"
    )
    with pytest.raises(UserError, match="lacks answer, choices, subject"):
        len(MMLU("dev"))
    (hub / "mirror/datasets/allenai/ai2_arc/ARC-Easy/train-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError):
        len(ARC("ARC-Easy", "train"))


# ---- spelling and your own conversations


def test_simple_spelling() -> None:
    conv = SimpleSpelling(["cat"], 3)[2]
    assert [m["content"] for m in conv["messages"]] == ["Spell the word: cat", "cat:c,a,t"]


def test_spelling_bee() -> None:
    task, test = SpellingBee(["banana", "kiwi"], 400), SpellingBee(["banana", "kiwi"], 400, "test")
    assert [c["messages"] for c in task] != [c["messages"] for c in test]
    inside = 0
    for conv in task:
        steps, code, output, end = conv["messages"][1]["content"]
        word, letter = code["text"].split("'")[1:4:2]
        assert code["text"] == f"'{word}'.count('{letter}')" and output["text"] == str(word.count(letter))
        assert f"\n{word}:{','.join(word)}\n" in steps["text"] and end["text"].endswith(
            f"\n#### {word.count(letter)}"
        )
        assert word in conv["messages"][0]["content"] and letter in conv["messages"][0]["content"]
        assert task.evaluate(conv, f"#### {word.count(letter)}") and not task.evaluate(conv, "#### 9")
        inside += letter in word
    assert 340 < inside < 390
    told = next(c for c in task if "'banana'.count('n')" in str(c))["messages"][1]["content"][0]["text"]
    assert "\n1:b\n2:a\n3:n hit! count=1\n4:a\n5:n hit! count=2\n6:a\n" in told


@pytest.mark.parametrize("bad", [[], ["it's"], [""]])
def test_spelling_needs_words(bad: list[str]) -> None:
    with pytest.raises(ValueError, match="letters only"):
        SpellingBee(bad, 1)
    with pytest.raises(ValueError, match="train or test"):
        SimpleSpelling(["a"], 1, "dev")


GOOD = (
    '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]'
)


def test_custom_conversations(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{GOOD}\n\n{{"messages": {GOOD}, "tag": 1}}\n')
    task = CustomJSON(path)
    assert len(task) == 2 and task[0]["messages"] == task[1]["messages"] and task[1]["tag"] == 1
    assert len(CustomJSON(path, start=1)) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON"),
        (b"3", "must be a list"),
        (b"[]", "must alternate"),
        (b'{"text": "x"}', "must be a list"),
        (b'[{"role": "user", "content": "hi"}]', "must alternate"),
        (b'[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]', "must alternate"),
        (b'[{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]', "message 1: content"),
        (b'[{"role": "user", "content": "a"}, {"role": "assistant", "content": [{}]}]', "message 2: content"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_bad_conversations_name_their_line(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"mine.jsonl line 2\b.*{problem}"):
        CustomJSON(path)


def test_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no conversations"):
        CustomJSON(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        CustomJSON(tmp_path / "none.jsonl")
