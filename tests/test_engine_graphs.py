"""Steps of fixed shapes, recorded once and replayed: without a GPU the recording is a list of ATen calls.

make_fx runs the function once and keeps the operations with the very tensors they read and wrote, as a CUDA
graph does; a replay that needed anything else (numbers of Python, a length read by the host) would compute
the old step again, or could not be recorded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import prompt
from test_engine_paged import MODEL, alone, run, start, texts
from torch.fx.experimental.proxy_tensor import make_fx

from nanochat import native
from nanochat.engine import graphs
from nanochat.engine.batch import Batch
from nanochat.engine.graphs import StaticSteps, blocks_of, rows_of


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


def static_batch(num_rows: int, context: int, capture: Any = Recorded, **how: Any) -> Batch:
    batch = Batch(MODEL, num_rows, context, **how)
    runner = batch.runner
    runner.native = None
    runner.static = StaticSteps(
        runner.network, runner.cache, runner._place, runner._windows, runner.num_kv_heads, runner.device,
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
    batch = static_batch(1, 60)
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
def test_on_a_gpu_graphs_equal_eager() -> None:
    from nanochat.engine.network import FusedNetwork

    model = MODEL.to("cuda")
    try:
        network = FusedNetwork(model, torch.float32)
        found = []
        for is_static in (True, False):
            batch = Batch(model, 4, 320, network=network)
            assert isinstance(batch.runner.static, graphs.StaticSteps)
            batch.runner.static = batch.runner.static if is_static else None
            found.append(run(batch, [start(ids, 20, seed=1, temperature=0.0) for ids in texts(4)]))
        assert found[0] == found[1]
    finally:
        model.to("cpu")
