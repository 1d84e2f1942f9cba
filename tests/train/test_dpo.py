"""DPO: weights are the gradient of the loss written out; pairs from a file; the stage learns and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_cases import RT, small_model
from helpers.small_home import TOK, save_model

from nanochat.errors import UserError
from nanochat.home import Home, read_json
from nanochat.run_dir import read_metrics
from nanochat.train.dpo import PairBatches, encode_pair, pair_weights
from nanochat.train.policy import log_probs
from nanochat.train.rollout import make_batch
from scripts import chat_dpo
from tasks.preferences import read_pairs

RECORDS = [
    {"messages": [{"role": "user", "content": "sky?"}], "chosen": "blue", "rejected": "green grass"},
    {"messages": [{"role": "user", "content": "the grass?"}], "chosen": "is green", "rejected": "is"},
    {"messages": [{"role": "user", "content": "a"}], "chosen": "the sky", "rejected": "x" * 20},
]


def test_only_the_answers_are_scored() -> None:
    """Prompt tokens have mask 0 in both; an earlier answer of the assistant too; its own end counts."""
    record = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "is"},
                     {"role": "user", "content": "b"}],
        "chosen": "blue", "rejected": "x",
    }  # fmt: skip
    pair = encode_pair(record, TOK, 99)
    assert pair is not None
    end = TOK.encode_special("<|assistant_end|>")
    for row, text in ((pair.chosen, "blue"), (pair.rejected, "x")):
        assert [i for i, m in zip(row.ids, row.mask, strict=True) if m] == [*TOK.encode(text), end]
    assert encode_pair(record, TOK, len(pair.chosen.ids) - 1) is None


def test_the_weights_are_the_gradient_of_the_loss() -> None:
    """Through a model: the gradient of sum(w * nll) / pairs is autograd's of the mean DPO loss."""
    model, reference, beta = small_model(3), small_model(4), 0.3
    pairs = [p for r in RECORDS if (p := encode_pair(r, TOK, 64))]
    batches = PairBatches(pairs, model, reference, RT, per_step=3, device_batch=6, beta=beta, seed=1)
    batch, sums = batches.weigh(pairs)
    hidden = model.hidden(batch.inputs_BT, None)
    loss = model.weighted_nll(hidden, batch.targets_BT, batch.weights_BT / batch.num_targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    rows, _ = make_batch([row for pair in pairs for row in (pair.chosen, pair.rejected)], RT.device)
    whole = model(rows.inputs_BT).log_softmax(-1)
    own = whole.gather(2, rows.targets_BT.clamp(min=0).unsqueeze(2)).squeeze(2) * (rows.targets_BT >= 0)
    gain = own.sum(1) - log_probs(reference, rows.inputs_BT, rows.targets_BT).sum(1)
    dpo = -torch.nn.functional.logsigmoid(beta * (gain[0::2] - gain[1::2])).mean()
    dpo.backward()
    assert float(sums[0] / sums[3]) == pytest.approx(float(dpo.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=2e-6)


def test_equal_models_have_no_margin() -> None:
    weights, margin = pair_weights(torch.tensor([-3.0, -5.0]), torch.tensor([-3.0, -5.0]), 0.4)
    assert margin.tolist() == [0.0] and weights.tolist() == pytest.approx([0.2, -0.2])


def test_pairs_of_two_ranks_are_those_of_one() -> None:
    pairs = [p for r in RECORDS if (p := encode_pair(r, TOK, 64))]
    model, seen = small_model(), []
    for rank in range(2):
        rt: Any = type(
            "R", (), {"rank": rank, "world_size": 2, "device": RT.device, "sum": lambda self, x: x}
        )()
        rows = PairBatches(pairs, model, model, rt, per_step=3, device_batch=2, beta=1.0, seed=1)
        assert rows.accum == 2
        made = iter(rows)
        seen += [next(made) for _ in range(2)]
        assert seen[-1].cursor == {"position": 3}
    assert sum(b.num_targets for b in seen) == 3


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    return path


def test_files_of_pairs(tmp_path: Path) -> None:
    short = {"prompt": "hi", "chosen": "a", "rejected": [{"type": "text", "text": "b"}]}
    (pair,) = read_pairs(write(tmp_path / "a", [short]))
    assert pair["messages"] == [{"role": "user", "content": "hi"}] and "prompt" not in pair
    for bad, problem in (
        ({"prompt": "hi", "chosen": "a"}, "rejected"), ([1], "object"),
        ({"chosen": "a", "rejected": "b"}, "messages"),
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "the same"), ({**short, "chosen": 4}, "chosen"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"line 2.*{problem}"):
            read_pairs(write(tmp_path / "b", [short, bad]))
    for content in ("", "{"):
        (tmp_path / "c").write_text(content)
        with pytest.raises(UserError):
            read_pairs(tmp_path / "c")
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "none")


def test_the_stage_learns_and_resumes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Preferring e's: the margin rises; a run that is cut off after step 4 ends with the same metrics."""
    where = Home(home)
    save_model(where, "sft", sequence_len=64)
    records = [
        {"prompt": "the " * (1 + i % 3) + "x" * (i % 5), "chosen": "green", "rejected": "blue sky"}
        for i in range(24)
    ]
    data = write(tmp_path / "pairs.jsonl", records)
    flags = [
        "--preset=smoke",
        f"--data={data}",
        "--pairs=4",
        "--lr-scale=1",
        "--device=cpu",
        "--dtype=float32",
    ]
    chat_dpo.main([*flags, "--epochs=2", "--keep=9"])
    rows = [row for row in read_metrics(where.metrics_file("main", "dpo")) if "margin" in row]
    result = read_json(where.result_file("main", "dpo"))
    assert rows[0]["margin"] == 0.0 and rows[0]["dpo_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result["val_preferred_frac"] == 1.0 and result["val_dpo_loss"] < 0.6 and result["steps"] == 11
    where.result_file("main", "dpo").unlink()
    chat_dpo.main([*flags, "--epochs=2", "--keep=9", "--resume=4"])
    assert "continuing from step 4" in capsys.readouterr().out
    again = [row for row in read_metrics(where.metrics_file("main", "dpo")) if "margin" in row]
    assert again == rows
    with pytest.raises(UserError, match="no pairs"):
        chat_dpo.main(["--preset=smoke"])
