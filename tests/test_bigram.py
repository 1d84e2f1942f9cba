"""The table of token pairs: its rows, who sees which pair, the engine, the optimizer's rule, the counts."""

import dataclasses

import pytest
import torch
from helpers.engine_cases import Bytes

from nanochat import scaling
from nanochat.bigram import BigramEmbedding, previous, slots
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim.groups import param_groups

CONFIG = GPTConfig(
    sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L"
)


def filled(rows: int = 64) -> GPT:
    model = GPT(dataclasses.replace(CONFIG, bigram_rows=rows))
    model.init_weights(3)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def test_rows_of_pairs_are_spread_and_depend_on_the_order() -> None:
    ids, prev = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    rows = slots(ids, prev, 4096)
    counts = torch.bincount(rows.flatten(), minlength=4096)
    assert counts.sum() == 256 * 256 and counts.min() > 0 and counts.max() < 5 * 16
    assert (rows != rows.T).float().mean() > 0.99
    assert int(slots(torch.tensor(32767), torch.tensor(32767), 2**20)) in range(2**20)


def test_previous_tokens_stop_at_borders() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert previous(ids).tolist() == [[-1, 5, 6, 7]]
    assert previous(ids, torch.tensor([[True, False, True, False]])).tolist() == [[-1, 5, -1, 7]]


def test_a_fresh_table_changes_nothing_and_none_has_no_parameter() -> None:
    plain, with_table = GPT(CONFIG), GPT(dataclasses.replace(CONFIG, bigram_rows=64))
    plain.init_weights(7)
    with_table.init_weights(7)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain(ids), with_table(ids), rtol=0, atol=0)
    assert plain.bigram_embeds is None and not any("bigram" in name for name, _ in plain.named_parameters())
    with pytest.raises(ValueError, match="bigram_rows must be at least 0"):
        GPTConfig(bigram_rows=-1)


def test_only_the_rows_of_seen_pairs_get_a_gradient() -> None:
    model = filled().train()
    assert isinstance(model.bigram_embeds, BigramEmbedding)
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    model(ids, torch.tensor([[2, 3, 1, 2, 3]])).backward()
    pairs = {int(slots(torch.tensor(b), torch.tensor(a), 64)) for a, b in ((1, 2), (2, 3), (3, 1))}
    grad = model.bigram_embeds.weight.grad
    assert grad is not None and set(grad.abs().sum(1).nonzero().flatten().tolist()) == pairs


def test_documents_in_a_row_do_not_see_each_other() -> None:
    model = filled()
    ids = torch.tensor([[9, 8, 7, 6, 5, 4]])
    whole = model(ids, doc_start=torch.tensor([[0, 0, 0, 3, 3, 3]], dtype=torch.int32))
    torch.testing.assert_close(whole[:, :3], model(ids[:, :3]), rtol=1e-5, atol=1e-5)
    first = model.bigram_embeds(ids[:, 3:], previous(ids)[:, 3:])  # type: ignore[misc]
    assert first.abs().sum() > 0  # the pair across the border exists, and must not be used
    with torch.no_grad():
        model.bigram_embeds.weight[slots(ids[:, 3], ids[:, 2], 64)] += 1.0  # type: ignore[union-attr]
    again = model(ids, doc_start=torch.tensor([[0, 0, 0, 3, 3, 3]], dtype=torch.int32))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_engine_equals_recomputation() -> None:
    model = filled()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [2]]
    got = Engine(model, Bytes()).complete(prompts, max_tokens=12)
    for prompt, answer in zip(prompts, got, strict=True):
        wanted = list(model.generate(prompt, 12, temperature=0))
        assert answer.ids == wanted[: len(answer.ids)] and len(answer.ids) >= 1
    assert max(len(answer.ids) for answer in got) == 12


def test_rule_and_counts() -> None:
    model = filled()
    groups = param_groups(model.named_parameters(), model_dim=32, batch_tokens=2**19, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    table = next(g for g in groups if any("bigram" in name for name, _ in g["params"]))
    assert table["kind"] == "adamw" and table["weight_decay"] == 0 and len(table["params"]) == 1
    counts = model.num_scaling_params()
    assert counts["bigram_embeds"] == 64 * 32
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["scaling"] == counts["transformer_matrices"] + counts["lm_head"]
    p = scaling.plan(2, aspect=32, head_dim=32, sequence_len=64, vocab_size=300, bigram_rows=128)
    with torch.device("meta"):
        net = GPT(p.config)
    assert net.num_scaling_params()["total"] == p.params_total and net.estimate_flops() == p.flops_per_token
    with pytest.raises(ValueError, match="bigram_rows must be at least 0"):
        scaling.plan(2, bigram_rows=-5)
