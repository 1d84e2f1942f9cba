"""The loader: exact resume, one global order for any number of ranks, whole conversations that stay apart."""

import gc
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.documents import in_blocks
from nanochat.data.loader import (
    IGNORED,
    Batch,
    ConversationBatches,
    DocumentBatches,
    packing_facts,
    validation_batches,
)
from nanochat.data.pack import CropPacker
from nanochat.errors import UserError

BOS, END = 256, 257
quick = settings(max_examples=15, deadline=None)


class ByteTokenizer:
    """One token a byte; the least that the loader needs."""

    def get_bos_token_id(self):
        return BOS

    def encode_special(self, text):
        return {"<|assistant_end|>": END}[text]

    def encode_arrow(self, array, prepend=None, num_threads=1):
        ids = [[prepend, *text.encode()] for text in array.to_pylist()]
        offsets = np.cumsum([0, *map(len, ids)])
        return np.array([i for one in ids for i in one], dtype=np.uint16), offsets

    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = [BOS], [0]
        for message in conversation["messages"]:
            is_answer = message["role"] == "assistant"
            part = [*message["content"].encode(), *([END] if is_answer else [])]
            ids += part
            mask += [int(is_answer)] * len(part)
        return ids[:max_tokens], mask[:max_tokens]

    def token_bytes(self):
        return np.array([1] * 256 + [0, 0], dtype=np.int32)

    def fingerprint(self):
        return "bytes"


@dataclass
class World:
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Numbers:
    """A source whose documents are functions of their number; validation holds `num_val` of them."""

    name, tokenizer = "numbers", None

    def __init__(self, num_val=40, fail_at=None):
        self.num_val, self.fail_at = num_val, fail_at

    def fingerprint(self):
        return "numbers"

    def close(self):
        pass

    def blocks(self, split, cursor=None):
        return in_blocks(self.documents(split, cursor))

    def documents(self, split, cursor=None):
        number = cursor["next"] if cursor else 0
        while split == "train" or number < self.num_val:
            if number == self.fail_at:
                raise UserError("shard 7 is damaged", "fetch it again")
            number += 1
            yield f"{split} {number} " * (1 + number * 37 % 11), {"next": number}


def documents(rank=0, world=1, rows=2, cursor=None, source=None):
    return DocumentBatches(
        source or Numbers(), ByteTokenizer(), sequence_len=24, device_batch=rows, rt=World(rank, world),
        cursor=cursor, buffer_docs=20,
    )  # fmt: skip


def take(batches, count):
    with batches:
        return [batch for _, batch in zip(range(count), batches)]


def inputs(batches):
    return torch.cat([batch.inputs_BT for batch in batches]).tolist()


def test_targets_are_the_next_tokens_and_count():
    for batch in take(documents(), 5):
        assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
        assert (
            batch.inputs_BT[:, 0] == BOS
        ).all() and batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.num_targets == 48 and batch.doc_start_BT is None


@quick
@given(stop=st.integers(1, 30), rows=st.integers(1, 4))
def test_resume_at_any_batch_equals_the_straight_run(stop, rows):
    straight = take(documents(rows=rows), stop + 12)
    resumed = take(documents(rows=rows, cursor=straight[stop - 1].cursor), 12)
    assert inputs(resumed) == inputs(straight[stop:])
    for one, other in zip(resumed, straight[stop:]):
        assert one.cursor["source"] == other.cursor["source"]
        assert np.array_equal(one.cursor["packer"]["tokens"], other.cursor["packer"]["tokens"])
        assert one.cursor["packer"]["counts"] == other.cursor["packer"]["counts"]


@quick
@given(world=st.integers(2, 4), rows=st.integers(1, 3))
def test_ranks_share_the_rows_of_one_rank(world, rows):
    alone = take(documents(rows=rows), 4 * world)
    ranks = [take(documents(rank, world, rows), 4) for rank in range(world)]
    together = [ranks[rank][step] for step in range(4) for rank in range(world)]
    assert inputs(together) == inputs(alone)


def test_one_rank_two_ranks_one_rank_is_the_same_sequence():
    alone = take(documents(), 12)
    first = take(documents(), 4)
    pair = [take(documents(rank, 2, cursor=first[-1].cursor), 2) for rank in (0, 1)]
    assert pair[0][-1].cursor["source"] == pair[1][-1].cursor["source"]
    last = take(documents(cursor=pair[1][-1].cursor), 4)
    middle = [pair[rank][step] for step in (0, 1) for rank in (0, 1)]
    assert inputs(first + middle + last) == inputs(alone)


def test_a_cursor_of_another_tokenizer_length_or_policy_is_refused():
    cursor = take(documents(), 1)[0].cursor
    with pytest.raises(UserError, match="another tokenizer"):
        documents(cursor=cursor | {"tokenizer": "other"})
    with pytest.raises(UserError, match="packing buffer was filled under"):
        DocumentBatches(
            Numbers(),
            ByteTokenizer(),
            sequence_len=32,
            device_batch=1,
            rt=World(),
            cursor=cursor,
            buffer_docs=20,
        )


def test_a_cursor_is_a_value_whenever_it_is_made():
    batches = take(documents(), 6)
    late = [batch.cursor for batch in batches]
    with documents() as again:
        early = [next(again).cursor for _ in range(6)]
    for one, other in zip(early, late):
        assert one["source"] == other["source"] and one["packer"]["counts"] == other["packer"]["counts"]
        assert np.array_equal(one["packer"]["tokens"], other["packer"]["tokens"])


def test_packing_facts_are_exact():
    cursor = take(documents(), 20)[-1].cursor
    facts = packing_facts(cursor)["packing"]
    buffered = int(cursor["packer"]["lengths"].sum())
    assert facts["tokens_in"] + facts["bos_added"] == facts["tokens_out"] + facts["tokens_dropped"] + buffered
    assert facts["tokens_out"] == 20 * 2 * 25 and facts["rows"] == 40
    assert facts["dropped_frac"] == pytest.approx(facts["tokens_dropped"] / facts["tokens_in"], abs=1e-6)
    assert packing_facts(None) == packing_facts({"row": 3}) == {}


def test_pieces_do_not_hold_the_blocks_they_came_from():
    cursor_pieces = CropPacker(25, BOS)
    block = np.full(10_000, BOS, dtype=np.int32)
    cursor_pieces.add(block[:20])
    assert cursor_pieces._pieces[0].base is None or cursor_pieces._pieces[0].base is not block


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_the_thread_ends_on_close_on_collection_and_on_error():
    before = len(loader_threads())
    batches = documents()
    next(batches)
    batches.close()
    assert len(loader_threads()) == before
    with pytest.raises(StopIteration):
        next(batches)
    batches = documents()
    next(batches)
    del batches
    gc.collect()
    assert len(loader_threads()) == before
    failing = documents(source=Numbers(fail_at=100))
    with pytest.raises(UserError, match="shard 7 is damaged"):
        for _ in failing:
            pass
    assert len(loader_threads()) == before


def validation(rank=0, world=1, rows=2, num_rows=13, source=None):
    return validation_batches(
        source or Numbers(),
        ByteTokenizer(),
        sequence_len=24,
        device_batch=rows,
        rt=World(rank, world),
        num_rows=num_rows,
    )


def real_rows(parts):
    """Rows with a target, in global order, from one list of batches a rank."""
    rows = []
    for step in range(len(parts[0])):
        for part in parts:
            batch = part[step]
            pairs = zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist())
            rows += [pair for pair in pairs if any(t != IGNORED for t in pair[1])]
    return rows


@pytest.mark.parametrize(("world", "rows"), [(1, 5), (2, 2), (3, 1), (4, 3)])
def test_validation_rows_do_not_depend_on_ranks_or_device_batch(world, rows):
    alone = list(validation())
    parts = [list(validation(rank, world, rows)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert real_rows(parts) == real_rows([alone]) and len(real_rows([alone])) == 13
    assert sum(batch.num_bytes for part in parts for batch in part) == sum(batch.num_bytes for batch in alone)


def test_validation_is_repeatable_counts_bytes_and_ends_with_the_data():
    batches = validation(num_rows=10_000)
    assert inputs(batches) == inputs(batches)
    text_bytes = sum(len(text.encode()) for text, _ in Numbers().documents("val"))
    found = sum(batch.num_bytes for batch in batches)
    assert found == sum(batch.num_targets for batch in batches)  # one byte a token here, specials left out
    assert 0.9 * text_bytes < found <= text_bytes
    assert batches.num_rows < 10_000 and validation(num_rows=3).num_rows == 3


def chat(*turns):
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns)]}


def task(count=30):
    return [chat(f"q{i}" * (1 + i % 4), f"answer {i}" * (1 + i % 3)) for i in range(count)]


def conversations(conversations, rank=0, world=1, rows=2, length=48, **options):
    return ConversationBatches(
        conversations, ByteTokenizer(), sequence_len=length, device_batch=rows, seed=3,
        rt=Gathering(rank, world, conversations), **options,
    )  # fmt: skip


@dataclass
class Gathering(World):
    """One rank of several, alone: it works out itself what the others would send."""

    task: object = None

    def gather(self, mine):
        def measure(item):
            count = len(ByteTokenizer().render_conversation(self.task[item])[0])
            assert count <= 48
            return count

        shares = [
            [measure(i) for i in range(r, len(self.task), self.world_size)] for r in range(self.world_size)
        ]
        if self.world_size > 1:
            assert shares[self.rank] == mine
            return shares
        return [mine]

    def __init__(self, rank, world, task):
        super().__init__(rank, world)
        self.task = task


def spans(batch, b):
    """(inputs, targets) of every conversation of row b, by doc_start."""
    start, found = batch.doc_start_BT[b].tolist(), []
    for first in sorted(set(start)):
        here = [t for t, s in enumerate(start) if s == first]
        assert here == list(range(first, first + len(here)))
        found.append((batch.inputs_BT[b, here].tolist(), batch.targets_BT[b, here].tolist()))
    return found


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_packed_conversations_are_the_rendered_ones_each_once_an_epoch(loss_on):
    tok, seen = ByteTokenizer(), []
    for batch in conversations(task(), last="blank", loss_on=loss_on):
        assert batch.doc_start_BT.dtype == torch.int32
        assert batch.num_targets == int((batch.targets_BT != IGNORED).sum())
        for b in range(2):
            for ids, targets in spans(batch, b):
                if all(t == IGNORED for t in targets):
                    assert set(ids) == {BOS}  # padding
                else:
                    seen.append((ids, targets))
    expected = []
    for conversation in task():
        ids, mask = tok.render_conversation(conversation)
        keep = [1] * len(ids) if loss_on == "all" else mask
        expected.append((ids, [i if m else IGNORED for i, m in zip(ids[1:], keep[1:])] + [IGNORED]))
    assert sorted(seen) == sorted(expected)


def test_epochs_reshuffle_and_whole_steps_take_rows_of_the_next():
    batches = conversations(task(), epochs=2.5, rows_per_step=8)
    per_epoch = batches.num_rows / 2.5
    assert (
        batches.num_steps == -(-batches.num_rows // 8)
        and batches.num_extra == batches.num_steps * 8 - batches.num_rows
    )
    rows = inputs(batches)
    assert len(rows) == batches.num_steps * 8
    assert rows[: int(per_epoch)] != rows[int(per_epoch) : 2 * int(per_epoch)]
    assert (
        inputs(conversations(task(), epochs=4.0))[: len(rows)] == rows
    )  # more epochs only continue the sequence


@quick
@given(stop=st.integers(1, 8), world=st.integers(1, 3))
def test_conversations_resume_anywhere_and_with_any_ranks(stop, world):
    alone = inputs(conversations(task(), rows=1, epochs=3))
    straight = take(conversations(task(), rows=1, epochs=3), stop)
    cursor = straight[-1].cursor
    parts = [
        take(conversations(task(), rank, world, rows=1, epochs=3, cursor=cursor), 3) for rank in range(world)
    ]
    together = [parts[rank][step] for step in range(3) for rank in range(world)]
    assert inputs(straight + together) == alone[: stop + 3 * world]


def test_long_conversations_are_cut_after_an_answer_or_dropped_and_counted():
    cut = chat("hi", "yes", "and then?", "no " * 30)
    items = [cut, chat("x" * 60, "too late"), chat("hello", "there")]
    batches = ConversationBatches(
        items, ByteTokenizer(), sequence_len=32, device_batch=1, rt=Alone(), seed=0, last="blank"
    )
    assert (batches.num_cut, batches.num_dropped) == (1, 1)
    text = bytes(t for row in inputs(batches) for t in row if t < 256)
    assert sorted((b"hiyes" in text, b"hellothere" in text, b"and then" in text)) == [False, True, True]
    with pytest.raises(UserError, match="none of 1 conversations has an answer that ends within 32 tokens"):
        ConversationBatches(items[1:2], ByteTokenizer(), sequence_len=32, device_batch=1, rt=Alone(), seed=0)


class Alone(World):
    def gather(self, mine):
        return [mine]


def test_conversations_outside_the_cache_are_rendered_again(monkeypatch):
    expected = inputs(conversations(task(), epochs=2))
    monkeypatch.setattr("nanochat.data.loader.CACHED_TOKENS", 50)
    assert inputs(conversations(task(), epochs=2)) == expected


def test_a_cursor_of_other_conversations_is_refused():
    cursor = take(conversations(task()), 1)[0].cursor
    with pytest.raises(UserError, match="other conversations"):
        conversations(task(29), cursor=cursor)
    with pytest.raises(ValueError, match="loss_on"):
        conversations(task(), loss_on="user")


def test_a_batch_moves_with_all_its_tensors():
    ones = torch.ones(1, 2)
    moved = Batch(ones.long(), ones.long(), weights_BT=ones, num_targets=2).to(torch.device("cpu"))
    assert torch.equal(moved.weights_BT, ones) and moved.doc_start_BT is None and moved.num_targets == 2
