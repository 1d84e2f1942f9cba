"""Rows on the device: documents or conversations in, `Batch` out, made ahead by a thread.

The order of rows is global. With W ranks and B rows a batch, micro-step m is rows m·W·B to (m+1)·W·B of one
endless sequence, and rank r has rows (m·W + r)·B to (m·W + r + 1)·B: the rows of an optimizer step depend on
the product of ranks and accumulation only. Every rank packs the whole stream and keeps its own rows.

Letters: B rows of a batch, T time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nanochat.data.documents import Cursor, DocumentBlock
from nanochat.data.pack import CropPacker, cut_conversation, plan_whole
from nanochat.data.sources import Source
from nanochat.errors import UserError
from nanochat.protocols import Tokenizer

IGNORED = -1  # the target of a position that does not count
NUM_AHEAD = 2  # batches waiting in the queue beside those of a whole step; one more is in the making
CACHED_TOKENS = 1 << 25  # of rendered conversations kept in memory, at 5 bytes

Batches = Generator["Batch", None, None]


@dataclass
class Batch:
    """One micro-batch of one rank. doc_start: the position in its row where a token's conversation starts.

    resume makes the cursor, which resumes right after this batch: making one costs a millisecond, and only a
    checkpoint needs it. num_targets and num_bytes are this rank's, counted on the host.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor | None = None
    doc_start_BT: torch.Tensor | None = None
    resume: Callable[[], Cursor] | None = None
    num_targets: int = 0
    num_bytes: int = 0

    @property
    def cursor(self) -> Cursor | None:
        return None if self.resume is None else self.resume()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy is asynchronous where the tensors are pinned."""

        def move(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        inputs, targets, weights = move(self.inputs_BT), move(self.targets_BT), move(self.weights_BT)
        starts = move(self.doc_start_BT)
        return Batch(inputs, targets, weights, starts, self.resume, self.num_targets, self.num_bytes)


class Prefetched:
    """Iterates over batches that a thread makes ahead; what the thread raises, `next` raises.

    accum: the batches of a step, which are taken at once. cancel wakes the thread where it waits for
    something else than the queue. `close()`, the end of `with`, or the last reference to it going away ends
    the thread.
    """

    def __init__(
        self, batches: Batches, device: torch.device, accum: int, cancel: Callable[[], None] = lambda: None
    ) -> None:
        self._device = device
        self._queue: queue.Queue[Any] = queue.Queue(NUM_AHEAD + accum)
        stop = threading.Event()
        args = (batches, self._queue, stop, device)
        thread = threading.Thread(target=_produce, args=args, name="batches", daemon=True)
        self.close = weakref.finalize(self, _end, thread, stop, cancel)  # runs at interpreter exit, too
        thread.start()

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Batch):
            return item.to(self._device)
        self.close()
        raise item

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(batches: Batches, out: queue.Queue[Any], stop: threading.Event, device: torch.device) -> None:
    def offer(item: Any) -> None:
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                break
            except queue.Full:
                pass

    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for batch in batches:
            offer(batch)
            if stop.is_set():
                break
        offer(StopIteration())
    except BaseException as error:  # it belongs to the consumer, whatever it is
        offer(error)
    finally:
        batches.close()


def _end(thread: threading.Thread, stop: threading.Event, cancel: Callable[[], None]) -> None:
    stop.set()
    cancel()
    if thread is not threading.current_thread():  # the garbage collector may run in the thread itself
        thread.join(timeout=10.0)


def _tensor(values: np.ndarray, rt: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A host copy, pinned for CUDA (its allocator reuses a block only after the copy from it is done)."""
    tensor = torch.empty(values.shape, dtype=dtype, pin_memory=rt.device.type == "cuda")
    return tensor.copy_(torch.from_numpy(values))


def _encode(
    blocks: Iterator[DocumentBlock], tok: Tokenizer
) -> Iterator[tuple[np.ndarray, DocumentBlock, int]]:
    """(token ids behind BOS, block, number in it) of each document, encoded a block at a time."""
    bos, num_threads = tok.get_bos_token_id(), min(4, os.cpu_count() or 1)
    for block in blocks:
        if block.dtype is not None:
            tokens, offsets = block.tokens()
        else:
            tokens, offsets = tok.encode_arrow(block.array, prepend=bos, num_threads=num_threads)
        ends = offsets.tolist()
        for i in range(len(block)):
            yield tokens[ends[i] : ends[i + 1]], block, i


def _check_tokenizer(source: Source, tok: Tokenizer) -> None:
    if source.tokenizer not in (None, tok.fingerprint()):
        problem = f"the tokens of {source.name} were made with another tokenizer"
        raise UserError(problem, "restore that tokenizer, or make the shards again: scripts.tok_shards")


# documents


class DocumentBatches(Prefetched):
    """Endless batches of packed training documents (CropPacker), resumable after any batch, bit for bit.

    The cursor (source position, packing buffer) fits any number of ranks and any device batch. UserError when
    it was made with other data, another tokenizer, length or policy.
    """

    def __init__(
        self, source: Source, tok: Tokenizer, *, sequence_len: int, device_batch: int, rt: Any,
        cursor: dict[str, Any] | None = None, buffer_docs: int = 1000, policy: str = "split", accum: int = 1,
    ) -> None:  # fmt: skip
        packer = CropPacker(
            sequence_len + 1, tok.get_bos_token_id(), policy=policy, buffer_pieces=buffer_docs
        )
        if cursor is not None:
            if cursor["tokenizer"] != tok.fingerprint():
                problem = "the saved position was made with another tokenizer"
                raise UserError(problem, "restore that tokenizer, or start a new run")
            try:
                packer.load(cursor["packer"])
            except ValueError as error:
                raise UserError(str(error), "resume with the settings the run was started with") from error
        _check_tokenizer(source, tok)
        position = cursor["source"] if cursor else None
        blocks = source.blocks("train", position)
        batches = _pack(blocks, position, tok, packer, device_batch, rt)
        super().__init__(batches, rt.device, accum, source.close)


def _pack(
    blocks: Iterator[DocumentBlock], position: Any, tok: Tokenizer, packer: CropPacker, num_rows: int, rt: Any
) -> Batches:
    encoded, made_by = _encode(blocks, tok), tok.fingerprint()
    where: Callable[[], Any] = lambda: position  # noqa: E731
    while True:
        rows = np.empty((rt.world_size * num_rows, packer.row_tokens), dtype=np.int32)
        for row in rows:
            while packer.wants_more:
                ids, block, i = next(encoded)
                where = partial(block.cursor, i)
                packer.add(ids)
            packer.fill(row)
        mine = rows[rt.rank * num_rows : (rt.rank + 1) * num_rows]
        inputs, targets = _tensor(mine[:, :-1], rt), _tensor(mine[:, 1:], rt)
        resume = partial(_cursor, made_by, where, packer.snapshot())
        yield Batch(inputs, targets, resume=resume, num_targets=targets.numel())


def _cursor(made_by: str, where: Callable[[], Any], packed: Callable[[], Any]) -> Cursor:
    return {"tokenizer": made_by, "source": where(), "packer": packed()}


def packing_facts(cursor: Cursor | None) -> dict[str, Any]:
    """What a run tells of its packing: exact counts; what was lost and added as shares of what came in."""
    if not cursor or "packer" not in cursor:
        return {}
    count = {name: int(value) for name, value in cursor["packer"]["counts"].items()}
    came = max(1, count["tokens_in"])
    shares = {"dropped_frac": count["tokens_dropped"] / came, "bos_added_frac": count["bos_added"] / came}
    return {"packing": count | {key: round(value, 6) for key, value in shares.items()}}


# validation


class ValidationBatches:
    """The same batches at every iteration: rows packed once from the validation split, in one global order.

    The rows do not depend on ranks, device batch or training's packing. Targets without bytes (specials,
    padding) are IGNORED: bits per byte = sum of nll / (ln 2 · num_bytes), both summed over batches and ranks.
    Every rank has equally many batches, filled up with padding; num_rows counts the real rows of all ranks.
    """

    def __init__(self, rows: np.ndarray, num_rows: int, token_bytes: np.ndarray, device_batch: int, rt: Any):
        self.num_rows = num_rows
        self._rows, self._token_bytes, self._device_batch, self._rt = rows, token_bytes, device_batch, rt

    def __len__(self) -> int:
        return len(self._rows) // self._device_batch

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._rows.reshape(len(self), self._device_batch, -1):
            num_bytes = self._token_bytes[rows[:, 1:]]
            targets = np.where(num_bytes > 0, rows[:, 1:], IGNORED)
            batch = Batch(_tensor(rows[:, :-1], self._rt), _tensor(targets, self._rt))
            batch.num_targets, batch.num_bytes = int((num_bytes > 0).sum()), int(num_bytes.sum())
            yield batch.to(self._rt.device)


def validation_batches(
    source: Source, tok: Tokenizer, *, sequence_len: int, device_batch: int, rt: Any, num_rows: int
) -> ValidationBatches:
    """The first `num_rows` rows of the validation split, or as many as it holds; keeps this rank's share."""
    bos = tok.get_bos_token_id()
    _check_tokenizer(source, tok)
    packer = CropPacker(sequence_len + 1, bos)
    encoded = _encode(source.blocks("val"), tok)
    mine, made = [], 0
    while made < num_rows:
        while packer.wants_more and (found := next(encoded, None)):
            packer.add(found[0])
        if not packer.tokens_buffered:
            break
        row = np.empty(packer.row_tokens, dtype=np.int32)
        packer.fill(row)
        if made // device_batch % rt.world_size == rt.rank:
            mine.append(row)
        made += 1
    missing = -(-made // (device_batch * rt.world_size)) * device_batch - len(mine)
    rows = np.stack(mine + [np.full(sequence_len + 1, bos, dtype=np.int32)] * missing)
    return ValidationBatches(rows, made, np.asarray(tok.token_bytes()), device_batch, rt)


# conversations


class ConversationBatches(Prefetched):
    """Whole conversations, best fit, resumable after any batch; they cannot see each other (with borders).

    num_rows: planned rows of `epochs` (each reshuffled by seed); num_steps = ceil(num_rows / rows_per_step),
    by default one batch of every rank a step. Where the task has `ends` (a curriculum), the conversations
    before each of them come in rows before all later ones. What the last step lacks are the sequence's next
    rows ("wrap", num_extra of them) or padding ("blank", right for evaluation). num_cut conversations were
    cut after the last answer that fits; num_dropped had none.
    """

    def __init__(
        self, task: Sequence[Any], tok: Tokenizer, *, sequence_len: int, device_batch: int, rt: Any,
        seed: int, epochs: float = 1.0, loss_on: str = "assistant", cursor: dict[str, Any] | None = None,
        rows_per_step: int | None = None, last: str = "wrap", borders: bool = True,
    ) -> None:  # fmt: skip
        if loss_on not in ("assistant", "all") or last not in ("wrap", "blank") or epochs <= 0:
            raise ValueError(f"loss_on, last or epochs is not as documented: {loss_on!r}, {last!r}, {epochs}")
        store = _Conversations(task, tok, sequence_len, loss_on == "all", rt, seed)
        self.num_cut, self.num_dropped = store.num_cut, store.num_dropped
        if cursor is not None and cursor["conversations"] != store.fingerprint:
            problem = (
                "the saved position belongs to other conversations, or another tokenizer, length or seed"
            )
            raise UserError(problem, "resume with the settings the run was started with, or start a new run")
        whole, part = divmod(epochs, 1.0)
        self.num_rows = sum(len(store.plan(epoch)) for epoch in range(int(whole)))
        self.num_rows += math.ceil(part * len(store.plan(int(whole)))) if part else 0
        per_step = rows_per_step or device_batch * rt.world_size
        self.num_steps = -(-self.num_rows // per_step)
        self.num_extra = self.num_steps * per_step - self.num_rows
        first, end = cursor["row"] if cursor else 0, self.num_rows + self.num_extra
        endless = itertools.chain.from_iterable(map(store.plan, itertools.count()))
        rows = itertools.islice(endless, first, self.num_rows if last == "blank" else None)
        accum = per_step // (device_batch * rt.world_size)
        super().__init__(_lay_out(store, rows, first, end, device_batch, rt, borders), rt.device, accum)


def _lay_out(
    store: _Conversations, rows: Iterator[list[int]], first: int, end: int, num_rows: int, rt: Any,
    borders: bool,
) -> Batches:  # fmt: skip
    per_batch = num_rows * rt.world_size
    for at in range(first, end, per_batch):
        inputs = np.full((num_rows, store.row_tokens), store.bos, dtype=np.int32)
        targets, starts = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
        group = [next(rows, []) for _ in range(per_batch)][rt.rank * num_rows : (rt.rank + 1) * num_rows]
        for b, row in enumerate(group):
            t = 0
            for item in row:
                ids, is_target = store.render(item)
                stop = t + len(ids)
                inputs[b, t:stop] = ids
                targets[b, t : stop - 1] = np.where(is_target[1:], ids[1:], IGNORED)  # none leads to the next
                starts[b, t:stop] = t
                t = stop
            starts[b, t:] = t
        doc_start = _tensor(starts, rt, torch.int32) if borders else None
        batch = Batch(_tensor(inputs, rt), _tensor(targets, rt), None, doc_start)
        batch.resume = partial(dict, conversations=store.fingerprint, row=at + per_batch)
        batch.num_targets = int((targets != IGNORED).sum())
        yield batch


class _Conversations:
    """Lengths and plans of all conversations; tokens of as many as CACHED_TOKENS holds, others made again."""

    def __init__(
        self, task: Sequence[Any], tok: Tokenizer, row_tokens: int, on_all: bool, rt: Any, seed: int
    ):
        self.task, self.tok, self.row_tokens, self.on_all, self.seed = task, tok, row_tokens, on_all, seed
        self.bos, self.end = tok.get_bos_token_id(), tok.encode_special("<|assistant_end|>")
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._num_cached = 0
        # every rank renders a share, so that planning a large mixture takes 1/W of the time
        shares = rt.gather([self._measure(item) for item in range(rt.rank, len(task), rt.world_size)])
        lengths = np.zeros(len(task), dtype=np.int64)
        for rank, share in enumerate(shares):
            lengths[rank :: rt.world_size] = share
        self.num_cut, self.num_dropped = int((lengths < 0).sum()), int((lengths == 0).sum())
        self._lengths = np.abs(lengths)
        ends = getattr(task, "ends", None) or [len(task)]
        self._parts = [a + np.flatnonzero(lengths[a:b]) for a, b in itertools.pairwise([0, *ends])]
        if not lengths.any():
            problem = f"none of {len(task)} conversations has an answer that ends within {row_tokens} tokens"
            raise UserError(problem, "give other conversations, or a longer --sequence-len")
        facts = repr((seed, row_tokens, on_all, tok.fingerprint(), *(ends[:-1]))).encode()
        self.fingerprint = hashlib.sha256(lengths.tobytes() + facts).hexdigest()

    def plan(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, as numbers of conversations; the same on every rank."""
        planned = (
            (part, plan_whole(self._lengths[part], self.row_tokens, seed=(self.seed, epoch)))
            for part in self._parts
        )
        return [part[row].tolist() for part, rows in planned for row in rows]

    def render(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether each token is a target) of the part that is kept."""
        return self._cache.get(item) or self._render(item)[:2]

    def _measure(self, item: int) -> int:
        """Tokens kept of a conversation: 0 if it is dropped, negative if it is cut."""
        ids, _, is_cut = self._render(item)
        return -len(ids) if is_cut else len(ids)

    def _render(self, item: int) -> tuple[np.ndarray, np.ndarray, bool]:
        all_ids, mask = self.tok.render_conversation(self.task[item], max_tokens=self.row_tokens + 1)
        keep = cut_conversation(all_ids, self.end, self.row_tokens)
        ids = np.array(all_ids[:keep], dtype=np.int32)
        is_target = np.array(mask[:keep], dtype=bool) | self.on_all
        if not is_target[1:].any():  # nothing to learn from it
            ids, is_target = ids[:0], is_target[:0]
        if self._num_cached < CACHED_TOKENS:
            self._cache[item] = (ids, is_target)
            self._num_cached += len(ids)
        return ids, is_target, keep < len(all_ids)
