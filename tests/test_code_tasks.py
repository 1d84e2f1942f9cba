"""HumanEval and MBPP on rows of our own: prompts, code out of answers, honest grading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.errors import UserError
from nanochat.paths import Home
from nanochat.sandbox import Sandbox
from tasks.code import LIMITS, code_of
from tasks.humaneval import HumanEval, before_function
from tasks.mbpp import MBPP, entry_of

HUMAN = {
    "task_id": "Own/0",
    "prompt": "import math\n\ndef area(r):\n    return math.pi * r * r\n\n\n"
    "def ring(a: float, b: float) -> float:\n"
    '    """Area between two circles.\n    >>> ring(1, 1)\n    0.0\n    """\n',
    "canonical_solution": "    return area(b) - area(a)\n\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1, 1) == 0\n"
    "    assert abs(candidate(0, 2) - area(2)) < 1e-9\n",
    "entry_point": "ring",
}
MBPP_ROWS = [
    {
        "text": "Write a function to count words by length.", "test_setup_code": "",
        "code": "from collections import Counter as C\r\ndef by_length(words):\r\n return C(map(len, words))",
        "test_list": ['assert by_length(["a", "b", "cc"]) == {1: 2, 2: 1}', "assert by_length([]) == {}"],
    },
    {
        "text": "Write a function to split off the first item.", "test_setup_code": "import math",
        "code": "def helper(x):\n  return x[0], x[1:]\ndef first(x):\n  return helper(x)",
        "test_list": ["assert first([1, 2]) == (1, [2])", "assert math.isinf(first([math.inf])[0])"],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS)
    except UserError as error:
        pytest.skip(f"not run: {error.problem}")


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "mirror"
    for name, rows in (
        ("openai/openai_humaneval/openai_humaneval/test-00000-of-00001.parquet", [HUMAN]),
        ("google-research-datasets/mbpp/full/test-00000-of-00001.parquet", MBPP_ROWS),
    ):
        path = root / "datasets" / name
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    monkeypatch.setenv("NANOCHAT_MIRROR", str(root))
    return root


def test_code_out_of_answers() -> None:
    assert code_of("x = 1\n") == "x = 1\n"
    assert code_of("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"
    assert code_of("```\nx = 1") == "x = 1"
    assert code_of("``` py\nx = '`'\n  ```") == "x = '`'"


def test_humaneval(mirror: Path, home: Path, sandbox: Sandbox) -> None:
    task = HumanEval(Home(home), sandbox=sandbox)
    (conversation,) = [task[i] for i in range(len(task))]
    reference = conversation["messages"][1]["content"]
    assert conversation["messages"][0]["content"] == HUMAN["prompt"] and task.name == "humaneval"
    assert before_function(HUMAN["prompt"], "ring").endswith("math.pi * r * r\n\n\n")
    bare = "def ring(a, b):\n    return area(b) - area(a)"  # the prompt's helpers need not be repeated
    answers: list[Any] = [
        (reference, True), (bare, True), (bare.replace("-", "+"), False), ("", False), ("No.", False),
        ("import sys\nsys.exit(0)", False), ("def area(r): return 0\n" + bare, False),
        ("def ring(a, b):\n    import os\n    os._exit(0)", False),
    ]  # fmt: skip
    found = task.evaluate_many([(conversation, text) for text, _ in answers])
    assert found == [right for _, right in answers]
    assert task.evaluate(conversation, reference) and task.reward(conversation, bare) == 1.0


def test_mbpp(mirror: Path, home: Path, sandbox: Sandbox) -> None:
    """Solutions may return subclasses of builtin types; tests may need their set-up."""
    task = MBPP("test", Home(home), sandbox=sandbox)
    conversations = [task[i] for i in range(2)]
    references = [c["messages"][1]["content"] for c in conversations]
    assert task.evaluate_many(list(zip(conversations, references, strict=True))) == [True, True]
    assert task.evaluate_many(list(zip(conversations, references[::-1], strict=True))) == [False, False]
    assert {c["entry"] for c in conversations} == {"by_length", "first"}
    assert "pass these tests:\n\nassert" in conversations[0]["messages"][0]["content"]
    with pytest.raises(ValueError):
        MBPP("dev", Home(home))
    with pytest.raises(ValueError, match="call none"):
        entry_of("def f(): pass", ["assert g() == 1"])


def test_no_sandbox_no_grading(mirror: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.sandbox.sandbox.Sandbox.probe", lambda self: "nothing holds")
    task = HumanEval(Home(home))
    with pytest.raises(UserError, match="nothing holds"):
        task.evaluate(task[0], "x = 1")
