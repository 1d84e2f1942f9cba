"""Shared beginnings: each candidate scores as if it stood alone (a network with windows, grouped heads)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_home import TOK
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.eval import branches, core
from nanochat.eval.branches import Tree, batches, score_examples, trees_of
from nanochat.eval.core import CoreTask
from nanochat.eval.rows import Row, score_endings
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

RT = Runtime(torch.device("cpu"), torch.float32)


def network() -> GPT:
    """Every part at work: smear, pairs, value embeddings, backout, a short window, grouped heads."""
    V = TOK.get_vocab_size()
    model = GPT(GPTConfig(512, V, 4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL", bigram_rows=97))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return model.eval()


MODEL = network()


def ids(length: int, seed: int) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(TOK.get_vocab_size(), (length,), generator=rng).tolist()


@torch.no_grad()
def alone(model: GPT, row: Row) -> tuple[float, bool]:
    """One row through the public forward, each token by itself, in fp64 from the logits on."""
    tokens, start = row
    logits_TV = model(torch.tensor([tokens]))[0].double()
    nlls = [-float(logits_TV[t - 1].log_softmax(-1)[tokens[t]]) for t in range(start, len(tokens))]
    return sum(nlls) / len(nlls), all(
        int(logits_TV[t - 1].argmax()) == tokens[t] for t in range(start, len(tokens))
    )


def assert_equal_to_alone(model: GPT, examples: list[list[Row]], batch_tokens: int) -> None:
    found = score_examples(model, examples, batch_tokens)
    assert list(map(len, found)) == list(map(len, examples))
    for rows, scores in zip(examples, found, strict=True):
        for row, (nll, is_greedy) in zip(rows, scores, strict=True):
            wanted = alone(model, row)
            assert nll == pytest.approx(wanted[0], abs=1e-5) and is_greedy == wanted[1]


@pytest.mark.parametrize("batch_tokens", [300, 5000])
@torch.no_grad()
def test_candidates_score_as_if_alone(batch_tokens: int) -> None:
    """Beginnings shorter and longer than the window (128), endings of one token and longer than the window,
    endings that begin before, at and after the fork, rows that share nothing, a single row."""
    assert MODEL.config.windows[0] == 128
    a, b, c = ids(300, 1), ids(20, 2), ids(140, 3)
    examples = [
        [([*a, *ids(n, n)], 300) for n in (1, 7, 30, 140)],
        [([*b, *ids(n, n)], 20) for n in (150, 3)],
        [([*c, *ids(n, n), *ids(5, 99)], 140 + n) for n in (2, 9, 4)],
        [([*b, *ids(4, n)], 15) for n in (8, 9)],
        [(ids(30, 11), 29), (ids(40, 12), 1)],
        [(ids(211, 13), 200)],
        [([*b, 5], 20), ([*b, 5, 6], 20)],
    ]
    assert_equal_to_alone(MODEL, examples, batch_tokens)
    assert score_examples(MODEL, [], 10) == []


@settings(max_examples=15)
@given(st.data())
@torch.no_grad()
def test_any_examples_score_as_if_alone(data: st.DataObject) -> None:
    """Small alphabets, so that rows share beginnings of any length, often whole rows."""
    token = st.integers(0, 2)
    examples = []
    for _ in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.lists(st.lists(token, min_size=2, max_size=9), min_size=1, max_size=4))
        examples.append([(row, data.draw(st.integers(1, len(row) - 1))) for row in rows])
    assert_equal_to_alone(MODEL, examples, data.draw(st.sampled_from([1, 16, 400])))


@torch.no_grad()
def test_greedy_is_found_across_the_fork() -> None:
    """The likeliest continuation of 40 tokens, as one candidate of two, is told as such."""
    start = ids(40, 4)
    said = list(start)
    for _ in range(3):
        said.append(int(MODEL(torch.tensor([said]))[0, -1].argmax()))
    other = [*start, (said[40] + 1) % 40, *said[41:]]
    ((first, second),) = score_examples(MODEL, [[(said, 40), (other, 40)]], 100)
    assert first[1] and not second[1] and first[0] < second[0]


@torch.no_grad()
def test_a_broken_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the line between branches, or without the window, scores differ by far more."""
    examples = [[([*ids(200, 1), *ids(n, n)], 200) for n in (9, 5)]]
    wanted = [alone(MODEL, row)[0] for row in examples[0]]
    real = branches.Sight.mask
    broken = (
        lambda self, window: real(dataclasses.replace(self, branch_BM=self.branch_BM * 0), window),
        lambda self, window: real(self, 1000),
    )
    for mask in broken:
        monkeypatch.setattr(branches.Sight, "mask", mask)
        found = [nll for nll, _ in score_examples(MODEL, examples, 1000)[0]]
        assert max(abs(x - y) for x, y in zip(found, wanted, strict=True)) > 1e-3


def test_trees() -> None:
    assert trees_of([([1, 2, 3], 2), ([1, 2, 4, 5], 2)]) == [Tree([1, 2], [[3], [4, 5]], [2, 2])]
    assert trees_of([([1, 2], 1), ([1, 2, 3], 2)]) == [Tree([1], [[2], [2, 3]], [1, 2])]
    assert trees_of([([1, 2], 1)]) == [Tree([1, 2], [], [1])]
    assert trees_of([([1, 2], 1), ([3, 2], 1)]) == [Tree([1, 2], [], [1]), Tree([3, 2], [], [1])]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 9), max_size=4)), max_size=20),
    st.integers(1, 120),
)
def test_batches_hold_each_tree_once(shapes: list[tuple[int, list[int]]], budget: int) -> None:
    trees = [Tree([0] * s, [[0] * n for n in sizes], []) for s, sizes in shapes]
    seen = []
    for chosen in batches(trees, budget):
        S, M = (
            max(f(trees[i]) for i in chosen) for f in (lambda t: len(t.shared), lambda t: t.branch_tokens)
        )
        assert len(chosen) == 1 or len(chosen) * (S + M) <= budget
        seen += chosen
    assert sorted(seen) == list(range(len(trees)))


def test_an_empty_ending_is_refused() -> None:
    for row in (([1, 2], 2), ([1, 2], 0)):
        with pytest.raises(ValueError, match="at least one"):
            score_examples(MODEL, [[row]], 10)


# ---------------------------------------------------------------- whole tasks of the three types

RECORDS = {
    "multiple_choice": [
        {"query": f"the sky {'is ' * i}", "choices": ["blue", "green grass", f"the {i}", "blue"[: i % 3 + 1]],
         "gold": i % 4} for i in range(7)
    ],
    "schema": [
        {"context_options": [f"the grass {'the ' * i}sky", f"the sky{' is' * (i + 1)} blue"],
         "continuation": "is green", "gold": i % 2} for i in range(7)
    ],
    "language_modeling": [{"context": f" the sky {'is ' * i}", "continuation": "blue,"} for i in range(7)],
}  # fmt: skip


@pytest.mark.parametrize("num_shots", [0, 3])
@pytest.mark.parametrize("kind", RECORDS)
def test_a_task_equals_one_row_at_a_time(
    kind: str, num_shots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy, and every score behind it, as prompts taken one by one through score_endings give them."""
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS[kind])))
    task = CoreTask("t", kind, file, num_shots, "\nAnswer: ", 0.0)
    records, wanted, right = core.read_records(task), [], 0
    for i in range(len(records)):
        encoded = TOK.encode(core.prompts(task, records, i), prepend=TOK.get_bos_token_id())
        rows = core.scored_rows(task, encoded)
        wanted += [score_endings(MODEL, [row], 1)[0] for row in rows]
        right += core.is_right(task, records[i], wanted[-len(rows) :])
    found: list[tuple[float, bool]] = []
    shown: list[tuple[int, int]] = []

    def kept(*arguments: Any) -> Any:
        scores = score_examples(*arguments)
        found.extend(score for rows in scores for score in rows)
        return scores

    monkeypatch.setattr(core, "score_examples", kept)
    monkeypatch.setattr(core, "CHUNK_EXAMPLES", 4)
    facts = core.evaluate_task(
        task, records, MODEL, TOK, RT, batch_tokens=600, progress=lambda done, of: shown.append((done, of))
    )
    assert [nll for nll, _ in found] == pytest.approx([nll for nll, _ in wanted], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert facts["accuracy"] == right / 7 and facts["total"] == 7
    assert shown == sorted(shown) and shown[-1] == (7, 7)


def test_models_with_an_end_see_the_last_tokens() -> None:
    """max_positions cuts on the left; rows that no longer begin alike are computed each by itself."""
    model = network()
    model.max_positions = 24  # type: ignore[assignment]
    record = {"query": "the sky is " * 9, "choices": ["blue", "green grass the sky"], "gold": 0}
    task = CoreTask("t", "multiple_choice", Path(), 0, " ", 0.0)
    encoded = TOK.encode(core.prompts(task, [record], 0), prepend=TOK.get_bos_token_id())
    rows = [(row[-24:], start - len(row) + 24) for row, start in core.scored_rows(task, encoded)]
    assert all(len(row) == 24 and 0 < start < 24 for row, start in rows) and len(encoded[0]) > 24
    nlls = [alone(model, row)[0] for row in rows]
    facts = core.evaluate_task(task, [record], model, TOK, RT)
    assert facts["accuracy"] == float(nlls[0] < nlls[1]) and math.isfinite(sum(nlls))
    assert core._cut(([1, 2, 3, 4], 1), 2) == ([3, 4], 1)
