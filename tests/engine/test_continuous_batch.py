"""The paged engine's identities in fp32: whatever is chunked, shared, forked, preempted or cached, the tokens
are those of the whole row computed anew.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.batch_cases import MODEL, Caller, Letters, alone, count_tokens, run, start, texts
from helpers.engine_cases import BOS, END, OUT, OUT_END, PY, PY_END, Bytes, prompt, tiny

from nanochat.engine.calculator import ToolState
from nanochat.engine.continuous_batch import ContinuousBatch
from nanochat.engine.engine import Engine, Sampling
from nanochat.engine.inference import InferenceGPT, cpu_dtype
from nanochat.engine.sequence import Sequence
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import build as native

ENGINE = Engine(MODEL, Bytes())


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("model", [MODEL, tiny(vocab_size=270, sequence_len=300)])
def test_the_inference_network_equals_the_plain_one(model: GPT) -> None:
    """And both equal the public forward, chunk sizes mixed, window and smear included."""
    ids = prompt(290)
    for network in (InferenceGPT(model, torch.float32), model):
        batch = ContinuousBatch(model, 2, 300, network=network, token_budget=37)
        row = start(ids, 0, temperature=0.0, prompt_top_logprobs=0)
        run(batch, [row])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        wanted = logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        assert row.prompt_logprobs is not None and row.prompt_logprobs[0] is None
        found = torch.tensor([entry[0] for entry in row.prompt_logprobs[1:] if entry])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_bf16_agrees() -> None:
    """Narrow weights move log-probabilities a little; the promise is a tolerance."""
    ids = prompt(40)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows.append(start(ids, 0, prompt_top_logprobs=0))
        run(ContinuousBatch(MODEL, 1, 50, network=InferenceGPT(MODEL, dtype)), [rows[-1]])
    ours, theirs = (torch.tensor([e[0] for e in row.prompt_logprobs if e]) for row in rows)
    assert 0 < (ours - theirs).abs().mean() < 0.1


# ---------------------------------------------------------------- the same tokens, however it is done


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sixty_four_together_equal_one_by_one(temperature: float) -> None:
    prompts = texts(64)
    group = [start(ids, 4 + i % 13, seed=i, temperature=temperature) for i, ids in enumerate(prompts)]
    together = run(ContinuousBatch(MODEL, 24, 80, token_budget=100), group)
    single = [alone(ids, 4 + i % 13, seed=i, temperature=temperature) for i, ids in enumerate(prompts)]
    assert together == single
    assert [len(ids) for ids in together] == [4 + i % 13 for i in range(64)]


def test_greedy_equals_naive_past_the_window() -> None:
    ids = prompt(280)
    assert alone(ids, 10, temperature=0.0) == list(MODEL.generate(ids, 10, temperature=0))


def test_preempted_equals_undisturbed() -> None:
    prompts = texts(8, longest=30)
    group = [start(ids, 30, seed=i) for i, ids in enumerate(prompts)]
    batch = ContinuousBatch(MODEL, 8, 80, num_blocks=12)
    assert run(batch, group) == [alone(ids, 30, seed=i) for i, ids in enumerate(prompts)]
    assert batch.scheduler.num_preempted >= 3


def test_forks_equal_separate_requests() -> None:
    for ids in (prompt(21), prompt(32), [7]):
        batch = ContinuousBatch(MODEL, 4, 60)
        forks = run(batch, [start(ids, 20, seed=5 + i) for i in range(4)])
        assert forks == [alone(ids, 20, seed=5 + i) for i in range(4)]
        assert len({tuple(fork) for fork in forks}) == 4


def test_forks_compute_the_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ContinuousBatch(MODEL, 4, 60)
    counts = count_tokens(batch, monkeypatch)
    run(batch, [start(prompt(21), 3, seed=i) for i in range(4)])
    assert counts == [21, 4, 4]


def test_cached_prefix_equals_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second turn, past the window; the first is not computed again."""
    batch = ContinuousBatch(MODEL, 2, 500)
    first = start(prompt(310), 20)
    run(batch, [first])
    later = [*first.prompt, *first.output, *prompt(30)]
    counts = count_tokens(batch, monkeypatch)
    warm = start(later, 15, seed=3)
    assert run(batch, [warm]) == [alone(later, 15, seed=3)]
    assert warm.num_cached == 320 and counts[0] == len(later) - 320
    batch.forget()
    cold = start(later, 15, seed=3)
    assert run(batch, [cold]) == [warm.output] and cold.num_cached == 0


@pytest.mark.parametrize("budget", [1, 3, 16, 100, 2048])
def test_any_prefill_chunk_equals_one(budget: int) -> None:
    ids = prompt(300)
    wanted = alone(ids, 6)
    group = [start(ids, 6), start(prompt(9), 6, seed=4)]
    outputs = run(ContinuousBatch(MODEL, 2, 310, token_budget=budget), group)
    assert outputs == [wanted, alone(prompt(9), 6, seed=4)]


def test_paged_kernels_equal_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, through page tables, and gathered blocks give what views of the cache give."""
    monkeypatch.setattr(native, "_override", False)
    prompts = texts(6, longest=300)
    wanted = [alone(ids, 8, seed=i) for i, ids in enumerate(prompts)]
    for is_paged in (True, False):
        batch = ContinuousBatch(MODEL, 6, 310, token_budget=64)
        batch.runner.is_paged = is_paged
        for pool in batch.blocks.pools:  # neighbours in time are no neighbours in memory
            monkeypatch.setattr(pool, "choose", lambda pool=pool: next(reversed(pool.free)))
        assert run(batch, [start(ids, 8, seed=i) for i, ids in enumerate(prompts)]) == wanted


def test_finished_rows_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ContinuousBatch(MODEL, 3, 60)
    counts = count_tokens(batch, monkeypatch)
    run(batch, [start(prompt(n), n) for n in (4, 6, 8)])
    assert counts == [18, *[3] * 3, *[2] * 2, *[1] * 2]


def test_rows_join_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ContinuousBatch(MODEL, 2, 60)
    counts = count_tokens(batch, monkeypatch)
    group = [start(prompt(n), n) for n in (3, 8, 5, 4)]
    run(batch, group[:3])
    assert counts == [11, 2, 2, 6, *[2] * 4]  # the third begins when the first has ended
    assert group[2].output == alone(prompt(5), 5)


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    ids = prompt(20)
    row = start(ids, 9, temperature=0.7, top_logprobs=3, prompt_top_logprobs=2)
    run(ContinuousBatch(MODEL, 1, 40), [row])
    whole = [*ids, *row.output]
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([whole]))[0].log_softmax(-1)
    for offset, entries, count in ((0, row.prompt_logprobs, 2), (20, row.logprobs, 3)):
        assert entries is not None and len(entries) == (20 if offset == 0 else 9)
        for n, entry in enumerate(entries):
            if entry is None:
                assert offset + n == 0
                continue
            own, likeliest = entry
            at = logprobs[offset + n - 1]
            assert own == pytest.approx(float(at[whole[offset + n]]), abs=1e-4)
            assert [i for i, _ in likeliest] == at.topk(count).indices.tolist()
            assert [value for _, value in likeliest] == pytest.approx(
                at.topk(count).values.tolist(), abs=1e-4
            )


def test_greedy_logprob_is_the_maximum() -> None:
    """The same float: lm-eval compares them with ==."""
    row = start(prompt(9), 8, temperature=0.0, top_logprobs=1)
    run(ContinuousBatch(MODEL, 1, 40), [row])
    assert row.logprobs is not None
    assert all(likeliest == [(token, own)] for token, (own, likeliest) in zip(row.output, row.logprobs))


def test_prompt_scores_without_an_answer() -> None:
    """max_tokens 0: only the prompt, and it is not taken from the cache, which holds no scores."""
    batch = ContinuousBatch(MODEL, 2, 40)
    run(batch, [start(prompt(33), 2)])
    row = ENGINE.start(prompt(33), Sampling(0.0), 0, prompt_top_logprobs=1)
    run(batch, [row])
    assert (row.output, row.finish_reason, len(row.prompt_logprobs or [])) == ([], "length", 33)
    whole = ENGINE.start(prompt(640), Sampling(0.0), 0, prompt_top_logprobs=0)
    assert len(whole.prompt) == 640  # a prompt as long as the context has room for no answer, and needs none


def test_preempted_scores_are_whole() -> None:
    batch = ContinuousBatch(MODEL, 4, 80, num_blocks=9, token_budget=20)
    group = [start(prompt(20 + n), 30, seed=n, top_logprobs=1, prompt_top_logprobs=0) for n in range(4)]
    run(batch, group)
    assert batch.scheduler.num_preempted
    for n, row in enumerate(group):
        single = start(prompt(20 + n), 30, seed=n, top_logprobs=1, prompt_top_logprobs=0)
        run(ContinuousBatch(MODEL, 1, 80), [single])
        assert row.output == single.output
        for ours, theirs in ((row.prompt_logprobs, single.prompt_logprobs), (row.logprobs, single.logprobs)):
            assert ours is not None and theirs is not None and len(ours) == len(theirs)
            pairs = zip(ours, theirs, strict=True)
            assert all(a == b or a[0] == pytest.approx(b[0], abs=1e-4) for a, b in pairs)


# ---------------------------------------------------------------- ends


def test_ends_wait_for_min_tokens() -> None:
    free = run(ContinuousBatch(MODEL, 1, 60), [start(prompt(5), 30)])[0]
    ends = {free[2], free[10]}
    first = next(n for n, token in enumerate(free) if token in ends)
    row = Engine(MODEL, Bytes()).start(prompt(5), Sampling(seed=1), 30, ends, ignore_eos=True)
    run(ContinuousBatch(MODEL, 1, 60), [row])
    assert row.output == free[: first + 1] and row.finish_reason == "stop"
    row = ENGINE.start(prompt(5), Sampling(seed=1), 30, ends, ignore_eos=True, min_tokens=20)
    run(ContinuousBatch(MODEL, 1, 60), [row])
    assert not ends & set(row.output[:20]) and len(row.output) > 20


def test_stop_strings_end_a_sequence() -> None:
    engine = Engine(MODEL, Letters())
    free = engine.start(prompt(5), Sampling(seed=1, banned=tuple(range(256, 262))), 30)
    run(ContinuousBatch(MODEL, 1, 60), [free])
    text = Letters().decode_bytes(free.output).decode()
    row = engine.start(prompt(5), free.sampling, 30, stop=["", text[7:10], "no such"])
    run(ContinuousBatch(MODEL, 1, 60), [row])
    end = text.find(text[7:10]) + 3
    assert (row.output, row.finish_reason) == (free.output[:end], "stop")


@pytest.mark.parametrize("in_bursts", [True, False])
def test_forced_output_enters_as_one_chunk(in_bursts: bool) -> None:
    model = Caller(GPTConfig(64, 262, 1, 1, 1, 24, "L"))
    model.init_weights(0)
    chain = [BOS, PY, *b"1+29", PY_END]
    model.nexts = dict(itertools.pairwise(chain)) | {OUT_END: ord("!")}
    batch = ContinuousBatch(model, 1, 40, in_bursts=in_bursts)
    row = Sequence([BOS], 30, Sampling(0.0), frozenset([END]), ToolState(Bytes()), top_logprobs=0)
    batch.admit([row])
    shown = []
    while batch.is_running:
        before = len(row.output)
        batch.emit()
        shown.append(len(row.output) - before)
        batch.compute()
    assert row.output == [*chain[1:], OUT, *b"30", OUT_END, ord("!"), END]
    assert row.mask == [1] * 6 + [0] * 4 + [1, 1]
    assert [PY_END, OUT, *b"30", OUT_END] in model.fed and len(model.fed) == 8
    assert max(shown) == (5 if in_bursts else 1)
    assert row.logprobs is not None and row.logprobs[6:10] == [(0.0, [])] * 4


# ---------------------------------------------------------------- weights


def test_changed_weights_are_noticed() -> None:
    """In place, through .data, and by load_state_dict; unchanged ones are cast once."""
    model = tiny()
    engine = Engine(model, Bytes(), torch.bfloat16)
    first = engine.network()
    assert engine.network() is first
    for change in (
        lambda: model.lm_head.weight.data.mul_(1.5),
        lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    ):
        before = engine.network()
        change()
        assert engine.network() is not before and engine.network() is engine.network()
    with torch.no_grad():
        model.resid_lambdas[0] += 1
    assert engine.network() is not before


def test_weights_are_cast_once() -> None:
    network = InferenceGPT(MODEL, torch.float32)
    assert network.wte.weight.data_ptr() == MODEL.wte.weight.data_ptr()  # tables are not copied
    assert torch.equal(network.lm_head.weight_OI, MODEL.lm_head.weight[:262])
    assert cpu_dtype(MODEL) == torch.float32
    assert InferenceGPT(MODEL, torch.bfloat16).blocks[0].attn.c_qkv.weight_OI.dtype == torch.bfloat16
