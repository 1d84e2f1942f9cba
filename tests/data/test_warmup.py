"""Lessons, then documents: one stream, one cursor."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch

from nanochat.corpus import document
from nanochat.data.loader import DocumentBatches
from nanochat.data.sources import SyntheticSource
from nanochat.data.warmup import CURSOR_KEY, WithWarmup
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from tasks.mixtures import primer

ROWS, T = 4, 128


@pytest.fixture(scope="module")
def tok() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator((document(1, i) for i in range(300)), 512)


def primed(tok: Any, lessons: Any) -> WithWarmup:
    how: dict[str, Any] = {"sequence_len": T, "device_batch": ROWS}
    how["rt"] = Runtime(torch.device("cpu"), torch.float32)
    documents = partial(DocumentBatches, SyntheticSource(1), tok, **how)
    return WithWarmup(lessons, documents, tok, seed=1, accum=2, **how)


def take(rows: WithWarmup, cursor: Any, count: int) -> list[Any]:
    stream = rows.batches(cursor)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def test_lessons_come_once_and_first_and_any_cursor_resumes(tok: RustBPETokenizer) -> None:
    rows = primed(tok, primer("smoke"))
    end = 2 * rows.num_curriculum_steps  # micro-batches
    batches = take(rows, None, end + 3)
    is_lesson = [CURSOR_KEY in batch.cursor for batch in batches]
    assert is_lesson == [True] * end + [False] * 3 and end >= 6
    assert all((batch.doc_start_BT is None) != lesson for batch, lesson in zip(batches, is_lesson))
    assert all(0 < batch.num_targets < ROWS * T for batch in batches[:end]), "answers only"
    plain = take(primed(tok, None), None, 3)
    assert all(a.inputs_BT.equal(b.inputs_BT) for a, b in zip(batches[end:], plain)), "documents as without"
    for stop in (0, 3, end - 2, end - 1, end, end + 1):
        again = take(rows, batches[stop].cursor, end + 2 - stop)
        for found, wanted in zip(again, batches[stop + 1 :], strict=True):
            assert found.inputs_BT.equal(wanted.inputs_BT) and found.targets_BT.equal(wanted.targets_BT)


def test_without_lessons_nothing_is_added(tok: RustBPETokenizer) -> None:
    rows = primed(tok, None)
    assert rows.num_curriculum_steps == 0 and "packer" in take(rows, None, 1)[0].cursor
