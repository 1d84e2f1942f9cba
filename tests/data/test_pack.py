"""Packing: each token is emitted, dropped and counted, or buffered; equal to a slow version; exact state."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.pack import CropPacker, cut_conversation, plan_whole

BOS = 0
quick = settings(max_examples=60, deadline=None)
document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def numbered(lengths):
    """Documents whose tokens are all different: BOS, then running numbers."""
    first, documents = 1, []
    for length in lengths:
        documents.append([BOS, *range(first, first + length)])
        first += length
    return documents


def drain(packer, documents):
    """All rows of the documents, the last ones from a buffer that is not refilled; padding cut off."""
    rows, waiting = [], iter(documents)
    while True:
        while packer.wants_more and (document := next(waiting, None)):
            packer.add(document)
        if not packer.tokens_buffered:
            return rows
        row = np.empty(packer.row_tokens, dtype=np.int32)
        rows.append(row[: packer.fill(row)].tolist())


def slow_pack(documents, size, min_tail, buffer_pieces, policy):
    """The rule written as a search through a list, with nothing clever."""
    buffer, rows, waiting = [], [], list(documents)

    def arrive(piece):
        while policy == "split" and len(piece) > size:
            buffer.append(piece[:size])
            piece = [BOS, *piece[size:]]
            if len(piece) - 1 < min_tail:
                return
        buffer.append(piece)

    while waiting or buffer:
        while waiting and len(buffer) < buffer_pieces:
            arrive(waiting.pop(0))
        row = []
        while len(row) < size and buffer:
            room = size - len(row)
            fitting = [piece for piece in buffer if len(piece) <= room]
            if fitting:
                best = max(fitting, key=len)  # the oldest of the longest
                buffer.remove(best)
                row += best
                continue
            worth = [piece for piece in buffer if len(piece) >= room + min_tail]
            if policy == "split":
                best = min(worth, key=len) if worth else max(buffer, key=len)
            else:
                best = min(buffer, key=len)
            buffer.remove(best)
            row += best[:room]
            if policy == "split" and len(best) - room >= min_tail:
                buffer.append([BOS, *best[room:]])
        rows.append(row)
    return rows


@quick
@given(
    document_lengths,
    st.integers(2, 24),
    st.integers(0, 9),
    st.integers(1, 8),
    st.sampled_from(["split", "crop"]),
)
def test_equal_to_the_slow_version(lengths, size, min_tail, buffer_pieces, policy):
    documents = numbered(lengths)
    packer = CropPacker(size, BOS, policy=policy, buffer_pieces=buffer_pieces, min_tail=min_tail)
    assert drain(packer, documents) == slow_pack(documents, size, min_tail, buffer_pieces, policy)


@quick
@given(document_lengths, st.integers(2, 24), st.integers(1, 8), st.sampled_from(["split", "crop"]))
def test_every_token_is_accounted_for(lengths, size, buffer_pieces, policy):
    documents = numbered(lengths)
    packer = CropPacker(size, BOS, policy=policy, buffer_pieces=buffer_pieces)
    row, seen = np.empty(size, dtype=np.int32), []
    for document in documents:
        packer.add(document)
        if not packer.wants_more:
            packer.fill(row)
            assert row[0] == BOS
            for before, after in itertools.pairwise(row):
                assert after in (BOS, before + 1) or before == BOS  # a piece is a run of one document
            seen += row[row != BOS].tolist()
        count = packer.counts
        balance = count["tokens_out"] + count["tokens_dropped"] + packer.tokens_buffered
        assert count["tokens_in"] + count["bos_added"] == balance
    kept = seen + [token for token in packer.state()["tokens"].tolist() if token != BOS]
    assert len(set(kept)) == len(kept) == sum(lengths) - packer.counts["tokens_dropped"]


@quick
@given(document_lengths, st.integers(0, 39), st.sampled_from(["split", "crop"]))
def test_state_restores_bit_for_bit(lengths, stop, policy):
    documents = numbered(lengths * 3)
    straight = CropPacker(16, BOS, policy=policy, buffer_pieces=5)
    for document in documents[:stop]:
        straight.add(document)
    saved = straight.state()
    before = saved["tokens"].copy(), saved["lengths"].copy(), dict(saved["counts"])
    rest = drain(straight, documents[stop:])
    resumed = CropPacker(16, BOS, policy=policy, buffer_pieces=5)
    resumed.load(saved)
    assert drain(resumed, documents[stop:]) == rest
    assert resumed.counts == straight.counts
    assert np.array_equal(before[0], saved["tokens"]) and np.array_equal(before[1], saved["lengths"])
    assert before[2] == saved["counts"]  # the state is a value: filling rows did not reach into it


def test_refuses_a_state_of_another_rule_and_documents_without_bos():
    with pytest.raises(ValueError, match="filled under"):
        CropPacker(16, BOS).load(CropPacker(32, BOS).state())
    with pytest.raises(ValueError, match="must start with BOS"):
        CropPacker(16, BOS).add([5, 6])
    with pytest.raises(ValueError, match="policy"):
        CropPacker(16, BOS, policy="greedy")


@pytest.mark.parametrize(("policy", "low", "high"), [("split", 0.0, 0.005), ("crop", 0.30, 0.40)])
def test_waste_on_documents_of_real_lengths(policy, low, high):
    """Log-normal lengths (mu 6.3, sigma 1.1), T = 2048; the first half fills the buffer as it stays."""
    lengths = np.random.default_rng(0).lognormal(6.3, 1.1, 24_000).astype(int) + 1
    document = np.ones(lengths.max() + 1, dtype=np.int32)
    document[0] = BOS
    packer, row, half = CropPacker(2049, BOS, policy=policy), np.empty(2049, dtype=np.int32), None
    for number, length in enumerate(lengths):
        packer.add(document[: length + 1])
        while not packer.wants_more:
            packer.fill(row)
        if number == len(lengths) // 2:
            half = dict(packer.counts)
    out, dropped, added = (packer.counts[n] - half[n] for n in ("tokens_out", "tokens_dropped", "bos_added"))
    assert low <= dropped / (out + dropped) <= high
    assert added / out < 0.001


@quick
@given(st.lists(st.integers(1, 32), max_size=200), st.integers(0, 5), st.integers(1, 40))
def test_plan_holds_every_item_once_in_rows_that_fit(lengths, seed, window):
    rows = plan_whole(lengths, 32, seed=seed, window=window)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[item] for item in row) <= 32 for row in rows)
    assert rows == plan_whole(lengths, 32, seed=seed, window=window)


def test_plan_is_tight_and_shuffled_and_refuses_what_cannot_fit():
    lengths = np.minimum(np.random.default_rng(1).lognormal(5.5, 1.0, 20_000).astype(int) + 1, 2048)
    first, second = plan_whole(lengths, 2048, seed=(7, 0)), plan_whole(lengths, 2048, seed=(7, 1))
    assert 1 - lengths.sum() / (len(first) * 2048) < 0.01
    assert first != second
    means = [
        np.mean([lengths[row].max() for row in part])
        for part in (first[: len(first) // 2], first[len(first) // 2 :])
    ]
    assert means[0] == pytest.approx(means[1], rel=0.1)  # no drift from large items to small ones
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.32"):
        plan_whole([33], 32)


def test_cut_conversation():
    ids = [0, 5, 9, 6, 9, 7, 9]
    assert [cut_conversation(ids, 9, size) for size in (7, 6, 5, 4, 3, 2)] == [7, 5, 5, 3, 3, 0]
