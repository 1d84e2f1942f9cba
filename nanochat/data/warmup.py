"""Lessons first, then documents: one stream of batches with one cursor for both.

The lessons are conversations packed as in fine-tuning (answers only, nothing seen across borders), once
through; the documents follow without end. docs/decisions.md says why lessons come first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from nanochat.data.loader import Batch, ConversationBatches
from nanochat.protocols import Tokenizer

LESSONS = "lessons"  # the cursor's key while the lessons last


class Primed:
    """`lessons`: a task or None. `batches(cursor)` resumes anywhere; num_primer_steps: 0 if None."""

    def __init__(
        self, lessons: Any, documents: Callable[..., Any], tok: Tokenizer, *,
        sequence_len: int, device_batch: int, rt: Any, seed: int, accum: int,
    ) -> None:  # fmt: skip
        self._lessons, self._documents, self._tok = lessons, documents, tok
        self._shape = {"sequence_len": sequence_len, "device_batch": device_batch, "rt": rt, "seed": seed}
        self._rows_per_batch = device_batch * rt.world_size
        self._rows_per_step = self._rows_per_batch * accum
        self.num_primer_steps = 0
        if lessons is not None:
            first = self._conversations(None)
            self.num_primer_steps = first.num_steps
            first.close()

    def _conversations(self, cursor: dict[str, Any] | None) -> ConversationBatches:
        return ConversationBatches(
            self._lessons, self._tok, rows_per_step=self._rows_per_step, cursor=cursor, **self._shape
        )

    def batches(self, cursor: dict[str, Any] | None) -> Any:
        """From the beginning (None), or right after the batch that carried `cursor`."""
        if self._lessons is None or (cursor is not None and LESSONS not in cursor):
            return self._documents(cursor=cursor)
        return self._chain(cursor[LESSONS] if cursor else None)

    def _chain(self, cursor: dict[str, Any] | None) -> Generator[Batch, None, None]:
        end, done = self.num_primer_steps * self._rows_per_step, cursor["row"] if cursor else 0
        if done < end:
            with self._conversations(cursor) as rows:
                for batch in rows:
                    done += self._rows_per_batch
                    batch.resume = partial(_among_lessons, batch.resume)
                    yield batch
                    if done >= end:
                        break
        with self._documents(cursor=None) as documents:
            yield from documents


def _among_lessons(resume: Callable[[], Any] | None) -> dict[str, Any]:
    return {LESSONS: resume() if resume else None}
