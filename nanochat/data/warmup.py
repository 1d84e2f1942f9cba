"""The warm-up curriculum, then the documents: one stream of batches with one cursor for both.

The curriculum consists of conversations, packed as in fine-tuning (the loss is on answers only, conversations
do not see each other) and read once. The documents follow without end. docs/decisions.md says why this order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from nanochat.data.loader import Batch, ConversationBatches
from nanochat.protocols import Tokenizer

CURSOR_KEY = "lessons"  # of a cursor inside the curriculum


class WithWarmup:
    """Batches of a curriculum and of the documents behind it. `batches(cursor)` resumes anywhere.

    curriculum: a task or None; documents: cursor -> batches. num_curriculum_steps is 0 without a curriculum.
    """

    def __init__(
        self, curriculum: Any, documents: Callable[..., Any], tok: Tokenizer, *,
        sequence_len: int, device_batch: int, rt: Any, seed: int, accum: int,
    ) -> None:  # fmt: skip
        self._curriculum = curriculum
        self._documents = documents
        self._tok = tok
        self._shape = {"sequence_len": sequence_len, "device_batch": device_batch, "rt": rt, "seed": seed}
        self._rows_per_batch = device_batch * rt.world_size
        self._rows_per_step = self._rows_per_batch * accum
        self.num_curriculum_steps = 0
        if curriculum is not None:
            first = self._conversations(None)
            self.num_curriculum_steps = first.num_steps
            first.close()

    def _conversations(self, cursor: dict[str, Any] | None) -> ConversationBatches:
        return ConversationBatches(
            self._curriculum, self._tok, rows_per_step=self._rows_per_step, cursor=cursor, **self._shape
        )

    def batches(self, cursor: dict[str, Any] | None) -> Any:
        """From the beginning (None), or right after the batch that carried `cursor`."""
        if self._curriculum is None or (cursor is not None and CURSOR_KEY not in cursor):
            return self._documents(cursor=cursor)
        return self._chain(cursor[CURSOR_KEY] if cursor else None)

    def _chain(self, cursor: dict[str, Any] | None) -> Generator[Batch, None, None]:
        end = self.num_curriculum_steps * self._rows_per_step
        done = cursor["row"] if cursor else 0
        if done < end:
            with self._conversations(cursor) as rows:
                for batch in rows:
                    done += self._rows_per_batch
                    batch.resume = partial(_curriculum_cursor, batch.resume)
                    yield batch
                    if done >= end:
                        break
        with self._documents(cursor=None) as documents:
            yield from documents


def _curriculum_cursor(resume: Callable[[], Any] | None) -> dict[str, Any]:
    return {CURSOR_KEY: resume() if resume else None}
