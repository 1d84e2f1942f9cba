"""Rows on the device: documents or conversations in, `Batch` out, made by a background thread.

The order of rows is global. With W ranks and B rows a batch, micro-step m holds the rows m·W·B ... (m+1)·W·B of
one endless sequence and rank r takes rows (m·W + r)·B ... + B, so the rows of an optimizer step depend on the product
of ranks and accumulation only. Every rank packs the whole stream and keeps its rows.

Letters: B rows of one batch, T time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import queue
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nanochat.data.pack import CropPacker, cut_conversation, plan_whole
from nanochat.data.sources import Source
from nanochat.errors import UserError

IGNORED = -1
PREFETCHED_BATCHES = 2
ENCODED_DOCUMENTS, ENCODED_CHARS = 256, 1 << 22  # whichever comes first makes one call of the tokenizer
CACHED_TOKENS = 1 << 25  # rendered conversations kept in memory: 5 bytes a token


@dataclass
class Batch:
    """One device batch: targets of IGNORED do not count; doc_start is the position where a token's conversation starts.

    cursor resumes right after this batch; num_targets and num_bytes are counted on the host, for this rank.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor | None = None
    doc_start_BT: torch.Tensor | None = None
    cursor: dict[str, Any] | None = None
    num_targets: int = 0
    num_bytes: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; asynchronous where they are pinned."""
        names = ("inputs_BT", "targets_BT", "weights_BT", "doc_start_BT")
        moved = {name: getattr(self, name) for name in names}
        return replace(
            self, **{k: v if v is None else v.to(device, non_blocking=True) for k, v in moved.items()}
        )


class Prefetched:
    """Iterates over batches that a thread makes ahead. Close it, use it with `with`, or drop it: the thread ends.

    What the thread raises is raised by `next`.
    """

    def __init__(self, batches: Generator[Batch, None, None], device: torch.device) -> None:
        self.device = device
        self._queue: queue.Queue[Any] = queue.Queue(PREFETCHED_BATCHES)
        stop = threading.Event()
        thread = threading.Thread(
            target=_produce, args=(batches, self._queue, stop, device), name="batches", daemon=True
        )
        self.close = weakref.finalize(self, _end, thread, stop)  # also at interpreter exit
        thread.start()

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Batch):
            return item.to(self.device)
        self.close()
        raise item

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(
    batches: Generator[Batch, None, None], out: queue.Queue[Any], stop: threading.Event, device: torch.device
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def offer(item: Any) -> None:
        while not stop.is_set():
            try:
                return out.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for batch in batches:
            if stop.is_set():
                return
            offer(batch)
        offer(StopIteration())
    except BaseException as error:  # belongs to the consumer, whatever it is
        offer(error)
    finally:
        batches.close()


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector may run in the thread itself
        thread.join(timeout=10.0)


class DocumentBatches(Prefetched):
    """Endless batches of packed training documents (CropPacker), exactly resumable from any batch's cursor.

    The cursor holds the source's position and the packing buffer; it fits any number of ranks and any device batch.
    """

    def __init__(
        self,
        source: Source,
        tok: Any,
        *,
        sequence_len: int,
        device_batch: int,
        rt: Any,
        cursor: dict[str, Any] | None = None,
        buffer_docs: int = 1000,
        policy: str = "carry",
    ) -> None:
        packer = CropPacker(
            sequence_len + 1, tok.get_bos_token_id(), policy=policy, buffer_pieces=buffer_docs
        )
        position = None
        if cursor is not None:
            position = cursor["source"]
            if cursor["tokenizer"] != tok.fingerprint():
                raise UserError(
                    "the saved position was made with another tokenizer",
                    "restore that tokenizer or start a new run",
                )
            try:
                packer.load(cursor["packer"])
            except ValueError as error:
                raise UserError(str(error), "resume with the settings the run was started with") from error
        documents = source.documents("train", position)
        super().__init__(_pack_batches(documents, position, tok, packer, device_batch, rt), rt.device)


def _pack_batches(
    documents: Iterator[tuple[str, dict]],
    position: dict | None,
    tok: Any,
    packer: CropPacker,
    rows: int,
    rt: Any,
) -> Generator[Batch, None, None]:
    encoded = _encode(documents, tok)
    while True:
        tokens = np.empty((rt.world_size * rows, packer.row_tokens), dtype=np.int32)
        for row in tokens:
            while packer.wants_more:
                ids, position = next(encoded)
                packer.add(ids)
            packer.fill(row)
        mine = tokens[rt.rank * rows : (rt.rank + 1) * rows]
        cursor = {"source": position, "tokenizer": tok.fingerprint(), "packer": packer.state()}
        yield Batch(
            _tensor(mine[:, :-1], rt), _tensor(mine[:, 1:], rt), cursor=cursor, num_targets=mine[:, 1:].size
        )


class ValidationBatches:
    """The same batches at every iteration: rows packed once from the validation split, in one global order.

    The rows do not depend on ranks, device batch or training packing. Targets without bytes (specials, padding) are
    IGNORED, so bits per byte = sum of nll / (ln 2 · num_bytes), both summed over batches and ranks. Every rank has
    equally many batches; rows missing in the last are padding. num_rows: the real rows, over all ranks.
    """

    def __init__(
        self, rows: np.ndarray, num_rows: int, token_bytes: np.ndarray, device_batch: int, rt: Any
    ) -> None:
        self.num_rows = num_rows
        self._rows, self._token_bytes, self._device_batch, self._rt = rows, token_bytes, device_batch, rt

    def __len__(self) -> int:
        return len(self._rows) // self._device_batch

    def __iter__(self) -> Iterator[Batch]:
        for tokens in self._rows.reshape(len(self), self._device_batch, -1):
            targets = tokens[:, 1:]
            num_bytes = self._token_bytes[targets]
            yield Batch(
                _tensor(tokens[:, :-1], self._rt),
                _tensor(np.where(num_bytes > 0, targets, IGNORED), self._rt),
                num_targets=int((num_bytes > 0).sum()),
                num_bytes=int(num_bytes.sum()),
            ).to(self._rt.device)


def validation_batches(
    source: Source, tok: Any, *, sequence_len: int, device_batch: int, rt: Any, num_rows: int
) -> ValidationBatches:
    """The first `num_rows` rows of the validation split (all of them if it holds fewer), this rank's share in memory."""
    packer = CropPacker(sequence_len + 1, tok.get_bos_token_id())
    encoded = _encode(source.documents("val"), tok)
    mine, made = [], 0
    while made < num_rows:
        while packer.wants_more and (pair := next(encoded, None)):
            packer.add(pair[0])
        if not packer.tokens_buffered:
            break
        row = np.empty(packer.row_tokens, dtype=np.int32)
        packer.fill(row)
        if made // device_batch % rt.world_size == rt.rank:
            mine.append(row)
        made += 1
    padding = np.full(sequence_len + 1, tok.get_bos_token_id(), dtype=np.int32)
    per_rank = -(-made // (device_batch * rt.world_size)) * device_batch
    rows = np.stack(mine + [padding] * (per_rank - len(mine)))
    return ValidationBatches(rows, made, np.asarray(tok.token_bytes()), device_batch, rt)


class ConversationBatches(Prefetched):
    """Batches of whole conversations, best fit, that cannot see each other (doc_start); resumable from any cursor.

    num_rows: planned rows of `epochs` (each reshuffled by seed); num_steps: ceil(num_rows / rows_per_step), where
    rows_per_step defaults to one batch of every rank. Rows missing in the last step are the next of the endless
    sequence ("wrap", counted in num_extra) or padding ("blank": right for evaluation). num_cut conversations were
    cut after the last answer that fits, num_dropped had none that fits.
    """

    def __init__(
        self,
        task: Sequence[Any],
        tok: Any,
        *,
        sequence_len: int,
        device_batch: int,
        rt: Any,
        seed: int,
        epochs: float = 1.0,
        loss_on: str = "assistant",
        cursor: dict[str, Any] | None = None,
        rows_per_step: int | None = None,
        last: str = "wrap",
    ) -> None:
        if loss_on not in ("assistant", "all") or last not in ("wrap", "blank") or epochs <= 0:
            raise ValueError(f"got loss_on={loss_on!r}, last={last!r}, epochs={epochs}: see the docstring")
        store = _Conversations(task, tok, sequence_len, loss_on, rt)
        self.num_cut, self.num_dropped = store.num_cut, store.num_dropped
        if not store.kept.size:
            raise UserError(
                f"no conversation of {len(task)} has an answer that ends within {sequence_len} tokens",
                "give other conversations or a longer --sequence-len",
            )
        whole, part = divmod(epochs, 1.0)
        plans = [store.plan(seed, epoch) for epoch in range(int(whole) + (part > 0))]
        self.num_rows = sum(map(len, plans)) - (
            len(plans[-1]) - math.ceil(part * len(plans[-1])) if part else 0
        )
        per_step = rows_per_step or device_batch * rt.world_size
        self.num_steps = -(-self.num_rows // per_step)
        self.num_extra = self.num_steps * per_step - self.num_rows
        identity = store.identity(seed)
        if cursor is not None and cursor["conversations"] != identity:
            raise UserError(
                "the saved position belongs to other conversations, or to another tokenizer, length or seed",
                "resume with the settings the run was started with, or start a new run",
            )
        rows = itertools.islice(_endless_rows(store, seed, plans), self.num_rows if last == "blank" else None)
        first = cursor["row"] if cursor else 0
        end = self.num_rows + self.num_extra
        batches = _conversation_batches(store, rows, identity, first, end, device_batch, rt)
        super().__init__(batches, rt.device)


def _endless_rows(store: _Conversations, seed: int, plans: list[list[list[int]]]) -> Iterator[list[int]]:
    for epoch in itertools.count():
        yield from plans[epoch] if epoch < len(plans) else store.plan(seed, epoch)


def _conversation_batches(
    store: _Conversations, rows: Iterator[list[int]], identity: str, first: int, end: int, size: int, rt: Any
) -> Generator[Batch, None, None]:
    rows = itertools.islice(rows, first, None)
    for at in range(first, end, size * rt.world_size):
        group = [next(rows, []) for _ in range(size * rt.world_size)]
        inputs = np.full((size, store.row_tokens), store.bos, dtype=np.int32)
        targets, starts = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        for b, row in enumerate(group[rt.rank * size : (rt.rank + 1) * size]):
            t = 0
            for item in row:
                ids, is_target = store.render(item)
                span = slice(t, t + len(ids))
                inputs[b, span], starts[b, span] = ids, t
                targets[b, t : t + len(ids) - 1] = np.where(is_target[1:], ids[1:], IGNORED)
                t += len(ids)
            starts[b, t:] = t
        yield Batch(
            _tensor(inputs, rt),
            _tensor(targets, rt),
            doc_start_BT=_tensor(starts, rt, torch.int32),
            cursor={"conversations": identity, "row": at + size * rt.world_size},
            num_targets=int((targets != IGNORED).sum()),
        )


class _Conversations:
    """Rendered conversations: the lengths of all, the tokens of as many as CACHED_TOKENS holds, others on demand."""

    def __init__(self, task: Sequence[Any], tok: Any, row_tokens: int, loss_on: str, rt: Any) -> None:
        self.task, self.tok, self.row_tokens, self.loss_on = task, tok, row_tokens, loss_on
        self.bos, self.end = tok.get_bos_token_id(), tok.encode_special("<|assistant_end|>")
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached_tokens = 0
        # every rank renders its share, so that planning a large mixture takes 1/W of the time
        shares = rt.gather([self._measure(item) for item in range(rt.rank, len(task), rt.world_size)])
        self.lengths = np.zeros(len(task), dtype=np.int64)
        for rank, share in enumerate(shares):
            self.lengths[rank :: rt.world_size] = [abs(length) for length in share]
        self.kept = np.flatnonzero(self.lengths)
        self.num_dropped = len(task) - self.kept.size
        self.num_cut = sum(length < 0 for share in shares for length in share)

    def _measure(self, item: int) -> int:
        """Tokens kept of a conversation, 0 if none, negative if it was cut."""
        ids, _, is_cut = self._render(item)
        return -len(ids) if is_cut else len(ids)

    def render(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether a token is a target) of the kept part."""
        return self._cache.get(item) or self._render(item)[:2]

    def _render(self, item: int) -> tuple[np.ndarray, np.ndarray, bool]:
        ids, mask = self.tok.render_conversation(self.task[item], max_tokens=self.row_tokens + 1)
        keep = cut_conversation(ids, self.end, self.row_tokens)
        kept_ids = np.array(ids[:keep], dtype=np.int32)
        is_target = np.array(mask[:keep], dtype=bool) | (self.loss_on == "all")
        if not is_target[1:].any():
            kept_ids, is_target = kept_ids[:0], is_target[:0]  # nothing to learn: the same as dropped
        if self._cached_tokens < CACHED_TOKENS:
            self._cache[item] = (kept_ids, is_target)
            self._cached_tokens += len(kept_ids)
        return kept_ids, is_target, keep < len(ids)

    def plan(self, seed: int, epoch: int) -> list[list[int]]:
        """Rows of item numbers; the same on every rank."""
        rows = plan_whole(self.lengths[self.kept], self.row_tokens, seed=(seed, epoch))
        return [self.kept[row].tolist() for row in rows]

    def identity(self, seed: int) -> str:
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(repr((seed, self.row_tokens, self.loss_on, self.tok.fingerprint())).encode())
        return digest.hexdigest()


def _encode(documents: Iterator[tuple[str, dict]], tok: Any) -> Iterator[tuple[np.ndarray, dict]]:
    """(token ids behind BOS, cursor) a document, encoded many at a time."""
    bos, threads = tok.get_bos_token_id(), min(4, os.cpu_count() or 1)
    while True:
        texts, cursors, num_chars = [], [], 0
        for text, cursor in documents:
            texts.append(text)
            cursors.append(cursor)
            num_chars += len(text)
            if len(texts) == ENCODED_DOCUMENTS or num_chars >= ENCODED_CHARS:
                break
        if not texts:
            return
        for ids, cursor in zip(tok.encode(texts, prepend=bos, num_threads=threads), cursors):
            yield np.asarray(ids, dtype=np.int32), cursor


def _tensor(values: np.ndarray, rt: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A host tensor of its own, pinned where the device is CUDA."""
    tensor = torch.empty(values.shape, dtype=dtype, pin_memory=rt.device.type == "cuda")
    tensor.copy_(torch.from_numpy(values))
    return tensor
