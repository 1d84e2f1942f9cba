"""Steps of fixed shapes, recorded once and replayed: without a GPU the recording is a list of ATen calls.

make_fx runs the function once and keeps the operations with the very tensors they read and wrote, as a CUDA
graph does; a replay that needed anything else (numbers of Python, a length read by the host) would compute
the old step again, or could not be recorded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.batch_cases import MODEL, alone, run, start, texts
from helpers.engine_cases import prompt
from torch.fx.experimental.proxy_tensor import make_fx

from nanochat.engine import cuda_graphs as graphs
from nanochat.engine.continuous_batch import ContinuousBatch
from nanochat.engine.cuda_graphs import StaticSteps, blocks_of, rows_of
from nanochat.engine.sampling import Draws, Sampling
from nanochat.engine.sequence import Sequence
from nanochat.kernels import build as native


class Recorded:
    """The CPU's stand-in for CudaGraph."""

    made = 0

    def __init__(self, function: Any, pool: Any) -> None:
        with torch.no_grad():
            self._operations = make_fx(lambda: function())()
            self.output = tuple(torch.empty_like(x) for x in function())
        Recorded.made += 1

    def replay(self) -> None:
        with torch.no_grad():
            for static, fresh in zip(self.output, self._operations(), strict=True):
                static.copy_(fresh)


def static_batch(num_rows: int, context: int, capture: Any = Recorded, **how: Any) -> ContinuousBatch:
    batch = ContinuousBatch(MODEL, num_rows, context, **how)
    runner = batch.runner
    runner.native = None
    runner.static = StaticSteps(
        runner.model, runner.cache, runner._place, runner._windows, runner.num_kv_heads, runner.device,
        capture,
    )  # fmt: skip
    return batch


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices go through PyTorch: a call by address cannot be recorded."""
    monkeypatch.setattr(native, "_override", False)
    monkeypatch.setattr(Recorded, "made", 0)


def test_buckets() -> None:
    assert [rows_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65)] == [1, 2, 4, 4, 8, 8, 16, 64, 72]
    assert [blocks_of(n) for n in (1, 8, 9, 16, 17, 100)] == [8, 8, 16, 16, 32, 128]


def test_replayed_equals_eager() -> None:
    """Rows join and leave, tables grow past a bucket, the window comes round, missing rows change nothing."""
    prompts = texts(5, longest=60) + [prompt(290)]
    limits = [9, 30, 4, 17, 25, 12]
    rows = [start(ids, n, seed=n, top_logprobs=1) for ids, n in zip(prompts, limits, strict=True)]
    batch = static_batch(4, 320)
    found = run(batch, rows)
    assert found == [alone(ids, n, seed=n) for ids, n in zip(prompts, limits, strict=True)]
    static = batch.runner.static
    assert static is not None and static.problem is None
    assert 3 <= Recorded.made == len(static._graphs) and set(static._graphs) <= {
        (rows, blocks) for rows in (1, 2, 4) for blocks in (8, 16, 32)
    }


def test_preempted_and_guessing() -> None:
    prompts = [(ids[:7] * 9)[:30] for ids in texts(4)]
    batch = static_batch(4, 60, num_blocks=9, speculate=4)
    found = run(batch, [start(ids, 20, seed=i, temperature=0.3) for i, ids in enumerate(prompts)])
    assert found == [alone(ids, 20, seed=i, temperature=0.3) for i, ids in enumerate(prompts)]
    assert batch.scheduler.num_preempted and Recorded.made


AHEAD_CASES = {
    "one row": ([9], {}),
    "limits of many": ([9, 3, 40, 21], {}),
    "sampled, each its own way": ([9, 3, 40, 21], {"temperature": 0.9, "top_k": 20}),
    "bans and biases": ([9, 3], {"banned": (5, 900), "logit_bias": {7: 3.0, 8: -50.0}}),
    "the window comes round": ([290], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AHEAD_CASES)
def test_ahead_of_the_host(name: str) -> None:
    """Tokens that are fed back on the device are those that the host would have fed back."""
    lengths, how = AHEAD_CASES[name]
    limits, asked = [25, 7, 18, 30][: len(lengths)], [prompt(n) for n in lengths]

    def rows() -> list[Sequence]:
        ways = [Sampling(**{"seed": n, **how}) for n in range(len(asked))]
        if "each its own" in name:
            ways[1] = Sampling(0.0)
        given = zip(asked, limits, ways, strict=True)
        return [Sequence(ids, limit, way, frozenset()) for ids, limit, way in given]

    plain = run(ContinuousBatch(MODEL, 4, 320), rows())
    for ahead, in_bursts in ((1, False), (5, False), (8, True)):
        batch = static_batch(4, 320, max_steps=ahead, in_bursts=in_bursts)
        reads = count_reads(batch)
        assert run(batch, rows()) == plain
        assert batch.runner.has_graphs and (reads[0] == 0) == (ahead == 1)


def count_reads(batch: ContinuousBatch) -> list[int]:
    """How often several tokens were read at once."""
    found, real = [0], batch.runner.draw_steps

    def ahead(*args: Any) -> Any:
        tokens = real(*args)
        found[0] += tokens is not None
        return tokens

    batch.runner.draw_steps = ahead  # type: ignore[method-assign]
    return found


@pytest.mark.slow
def test_what_ends_a_row_ends_what_was_drawn_ahead() -> None:
    """A stop token, a stop text, forced text, a caller who is gone; a newcomer; blocks that run out."""
    ids = prompt(9)
    said = alone(ids, 30, temperature=0.0)
    for ahead in (1, 8):
        batch = static_batch(2, 60, max_steps=ahead)
        row = start(ids, 30, temperature=0.0)
        row.stop_ids = frozenset({said[10]})
        assert run(batch, [row]) == [said[: said.index(said[10]) + 1]] and row.finish_reason == "stop"
        gone, other = start(ids, 30, temperature=0.0), start(prompt(12), 20, temperature=0.0)
        batch.admit([gone])
        while batch.is_running:
            batch.emit()
            if len(gone.output) == 6:
                gone.finish_reason = "abort"
                batch.admit([other])
            batch.compute()
        assert gone.output == said[:6] and other.output == alone(prompt(12), 20, temperature=0.0)
        tight = static_batch(3, 60, max_steps=ahead, num_blocks=7)
        assert run(tight, [start(p, 20, temperature=0.0) for p in texts(3)]) == [
            alone(p, 20, temperature=0.0) for p in texts(3)
        ]
        asked = start(ids, 30, temperature=0.0)
        batch.admit([asked])
        while batch.is_running:
            batch.emit()
            if len(asked.output) == 5 and not asked.forced:
                asked.forced.extend([1, 2, 3])  # as the tool does between two tokens
                asked.pending.clear()
            batch.compute()
        assert asked.output[:8] == [*said[:5], 1, 2, 3]
        assert asked.output[8:] == alone([*ids, *said[:5], 1, 2, 3], 22, temperature=0.0)


def test_the_tool_in_a_text_drawn_ahead() -> None:
    """Its answer is forced in the middle of tokens that were drawn without it."""

    class Tool:
        def __init__(self) -> None:
            self.seen = 0

        def feed(self, token: int) -> list[int]:
            self.seen += 1
            return [4, 5] if self.seen == 6 else []

    found = []
    for ahead in (1, 8):
        row = start(prompt(9), 24, temperature=0.0)
        row._tool = Tool()  # type: ignore[assignment]
        found += run(static_batch(1, 60, max_steps=ahead), [row])
    assert found[0] == found[1] and found[0][6:8] == [4, 5] and len(found[0]) == 24


def test_a_stale_replay_is_noticed() -> None:
    """The control: a graph that keeps its first output tells another story."""

    class Stale(Recorded):
        def replay(self) -> None:
            if Recorded.made >= 0:
                super().replay()
                Recorded.made = -1

    ids = prompt(9)
    assert run(static_batch(1, 60, Stale), [start(ids, 12)]) != [alone(ids, 12)]


def test_what_cannot_be_captured_runs_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(function: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    batch, ids = static_batch(2, 60, refuse), prompt(9)
    assert run(batch, [start(ids, 12)]) == [alone(ids, 12)]
    said = capsys.readouterr().err
    assert said.count("because RuntimeError: operation not permitted when stream is capturing\n") == 1


def test_logits_outlive_the_next_replay() -> None:
    """What a step gave is kept while others run: a graph's own memory is not handed out."""
    batch = static_batch(1, 60, max_steps=1)
    row = start(prompt(5), 9)
    batch.admit([row])
    batch.compute()
    batch.emit()
    batch.compute()
    kept = batch._ready[row][0]
    before = kept.clone()
    static = batch.runner.static
    assert static is not None
    for graph, *_ in static._graphs.values():
        graph.output[1].fill_(7.0)
    assert torch.equal(kept, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_graphs_equal_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no draw waits for the device."""
    from nanochat.engine.inference import InferenceGPT

    real = Draws.__call__

    def strict(self: Draws, *args: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Draws, "__call__", strict)
    model = MODEL.to("cuda")
    try:
        network = InferenceGPT(model, torch.float32)
        for temperature in (0.0, 0.7):
            found = []
            for is_static in (True, False):
                batch = ContinuousBatch(model, 4, 320, network=network)
                assert isinstance(batch.runner.static, graphs.StaticSteps)
                batch.runner.static = batch.runner.static if is_static else None
                rows = [start(ids, 20, seed=1, temperature=temperature) for ids in texts(4)]
                found.append(run(batch, rows))
            assert found[0] == found[1]
    finally:
        model.to("cpu")
