"""HumanEval and MBPP on rows of our own: prompts, code out of answers, honest grading."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.errors import UserError
from nanochat.home import Home
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


# Shapes that occur in MBPP: (solution, tests, set-up, a wrong answer).
SHAPES = {
    "floats": (
        "def area(r):\r\n  pi = 3.1415\r\n  return pi * r * r",
        ["assert math.isclose(area(10), 314.15, rel_tol=0.001)", "assert round(area(1), 2) == 3.14"],
        "import math", "def area(r): return 3 * r * r",
    ),
    "sets and tuples": (
        "def common(a, b):\n    return tuple(sorted(set(a) & set(b)))",
        ["assert common((3, 4, 5), (5, 4, 9)) == (4, 5)", "assert set(common([], [1])) == set()"],
        "", "def common(a, b): return list(set(a) & set(b))",
    ),
    "nested data": (
        "def group(pairs):\n    out = {}\n    for k, v in pairs:\n        out.setdefault(k, []).append(v)\n"
        "    return out",
        ["assert group([(1, 'a'), (2, None), (1, True)]) == {1: ['a', True], 2: [None]}"],
        "", "def group(pairs): return dict(pairs)",
    ),
    "several functions, a class inside": (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "def is_open(c): return c in '([{'\n"
        "def balanced(text):\n    s = Stack()\n    for c in text:\n"
        "        if is_open(c): s.items.append(c)\n"
        "        elif not s.items or s.items.pop() + c not in ('()', '[]', '{}'): return False\n"
        "    return not s.items",
        ["assert balanced('(([]))')", "assert not balanced('([)]')", "assert balanced('') == True"],
        "", "def balanced(text): return True",
    ),
    "parentheses and an argument that is changed": (
        "def move_zeros(xs):\n    xs[:] = [x for x in xs if x] + [0] * xs.count(0)\n    return xs",
        ["assert (move_zeros([1, 0, 2])) == [1, 2, 0]", "assert (sum(move_zeros([0, 0, 5]))) == 5"],
        "", "def move_zeros(xs): return sorted(xs)",
    ),
    "a class that the tests build": (
        "class Pair(object):\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
        "def widest(pairs):\n    return max(p.b - p.a for p in pairs)",
        ["assert widest([Pair(5, 24), Pair(15, 25)]) == 19"],
        "", "",
    ),
}  # fmt: skip


def needs_more(solution: str, setup: str, tests: list[str]) -> str:
    """Why a right solution cannot be graded here, or nothing: imports, or objects that are no literals."""
    body = ast.parse(solution).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    called = {
        node.func.id
        for text in (setup, *tests)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if classes & called:
        return f"its tests build {', '.join(sorted(classes & called))}"
    named = [
        name.split(".")[0]
        for node in ast.walk(ast.parse("\n".join((setup, solution))))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    ]  # fmt: skip
    missing = sorted(set(named) - sys.stdlib_module_names)
    return f"it imports {', '.join(missing)}" if missing else ""


def test_shapes_of_mbpp(
    tmp_path: Path, home: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right solutions pass, wrong ones fail; what no two processes can grade is known by its tests."""
    rows = [
        {"text": name, "code": code, "test_list": tests, "test_setup_code": setup}
        for name, (code, tests, setup, _) in SHAPES.items()
    ]
    path = tmp_path / "datasets/google-research-datasets/mbpp/full/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    monkeypatch.setenv("NANOCHAT_MIRROR", str(tmp_path))
    task = MBPP("test", Home(home), sandbox=sandbox)
    conversations = [task[i] for i in range(len(task))]
    shapes = [SHAPES[c["messages"][0]["content"].split("\n")[0]] for c in conversations]
    reasons = [needs_more(code, setup, tests) for code, tests, setup, _ in shapes]
    assert sorted(reasons) == [""] * 5 + ["its tests build Pair"]
    right = [(c, c["messages"][1]["content"]) for c in conversations]
    assert task.evaluate_many(right) == [not reason for reason in reasons]
    wrong = [(c, shape[3]) for c, shape in zip(conversations, shapes, strict=True)]
    assert task.evaluate_many(wrong) == [False] * len(rows)
    assert needs_more("import numpy as np\nfrom os import path", "", []) == "it imports numpy"


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_canonical_solutions(
    name: str, home: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reference solution of the real data passes but those that need more, which are named.

    Needs NANOCHAT_CODE_DATA: a mirror that holds the data set.
    """
    where = os.environ.get("NANOCHAT_CODE_DATA", "")
    monkeypatch.setenv("NANOCHAT_MIRROR", where)
    task = HumanEval(Home(home), sandbox=sandbox) if name == "humaneval" else MBPP("test", Home(home))
    if not where or not (Path(where) / "datasets" / task.repo).exists():
        pytest.skip(f"not run: {name} is not here (NANOCHAT_CODE_DATA=MIRROR)")
    conversations = [task[i] for i in range(len(task))]
    answers = [c["messages"][1]["content"] for c in conversations]
    failed = [
        i for i, passed in enumerate(task.evaluate_many(list(zip(conversations, answers, strict=True))))
        if not passed
    ]  # fmt: skip
    tests = [c["tests"] if isinstance(c["tests"], list) else [c["tests"]] for c in conversations]
    reasons = {
        i: needs_more(code_of(answers[i]), conversations[i].get("setup", ""), tests[i]) for i in failed
    }
    print(f"{name}: {len(task) - len(failed)} of {len(task)} pass; {reasons}")
    assert len(task) > 100 and all(reasons.values()), reasons
