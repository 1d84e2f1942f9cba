"""--tasks: names, times, kinds of the embedded corpus, files; through mid_train and chat_sft to chat_eval."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.rollout_cases import small_model
from helpers.small_home import TOK, save_model

from nanochat.data.loader import ConversationBatches
from nanochat.errors import UserError
from nanochat.home import Home, read_json
from nanochat.runtime import Runtime
from scripts import chat_sft, mid_train
from tasks.base import reference
from tasks.eval_tasks import open_tasks
from tasks.train_tasks import NAMED, open_chosen

ARC = [
    {
        "question": f"n{n}?", "answerKey": "2",
        "choices": {"text": list("vwxyz"[:n]), "label": list("12345"[:n])},
    }
    for n in (3, 4, 5)
] * 8  # fmt: skip
GSM8K = [{"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(20)]
TALK = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "mirror" / "datasets"
    for name, rows in (
        ("openai/gsm8k/main/train-00000-of-00001.parquet", GSM8K),
        ("allenai/ai2_arc/ARC-Easy/train-00000-of-00001.parquet", ARC),
        ("allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet", ARC),
        ("allenai/ai2_arc/ARC-Challenge/train-00000-of-00001.parquet", ARC),
        ("us/chats/train-00000-of-00001.parquet", [{"messages": TALK}] * 3),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    monkeypatch.setenv("NANOCHAT_MIRROR", str(root.parent))
    return root


def own(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"messages": TALK, "n": i}) + "\n" for i in range(count)))
    return path


def test_all_that_can_be_named(mirror: Path, home: Path, tmp_path: Path) -> None:
    mine = own(tmp_path / "mine.jsonl", 2)
    mixed = open_chosen(f"2xgsm8k, arc_easy,3xidentity:7,facts,hf:us/chats,{mine}", Home(home), seed=5)
    names = Counter(task.name for task in mixed.tasks)
    assert names == {
        "gsm8k": 2, "arc-easy": 1, "synthetic-identity": 3, "synthetic-facts": 1, "hf:us/chats": 1,
        "custom": 1,
    }  # fmt: skip
    assert len(mixed) == 2 * 20 + 24 + 3 * 7 + 1000 + 3 + 2
    again = open_chosen(f"2xgsm8k,arc_easy,3xidentity:7,facts,hf:us/chats,{mine}", Home(home), seed=5)
    assert [reference(mixed[i]) for i in range(50)] == [reference(again[i]) for i in range(50)]
    letters = Counter(len(c["letters"]) for c in mixed if "letters" in c)
    assert letters == {3: 8, 4: 8, 5: 8}


@pytest.mark.parametrize(
    "spec", ["", ",", "gsm8", "0xgsm8k", "gsm8k:3", "identity:none", "identity:0", "a.json"]
)
def test_names_of_nothing(spec: str, home: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_chosen(spec, Home(home))
    assert all(name in caught.value.hint for name in NAMED) or "must name" in caught.value.problem


def test_what_was_learned_is_what_is_measured(mirror: Path, home: Path) -> None:
    def auto(**trained: str | None) -> list[str]:
        return list(open_tasks("auto", trained, Home(home)))

    assert auto(tasks="4xgsm8k,arc_easy,smoltalk", mixture="speedrun") == ["gsm8k", "arc_easy"]
    assert auto(tasks="letters:50,identity", mixture="speedrun") == ["letters", "identity"]
    assert auto(tasks=None, mixture="cpu-demo") == auto(mixture="smoke")
    assert auto(tasks="smoltalk", mixture="speedrun") == auto(mixture="speedrun") != auto(mixture="smoke")


def test_mid_and_sft_learn_the_chosen(
    mirror: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that has changed is learned anew, one that has not is not."""
    where = Home(home)
    save_model(where, "base", sequence_len=256)
    mine = own(tmp_path / "mine.jsonl", 5)
    flags = ["--preset=smoke", "--batch-tokens=1024", "--device=cpu", "--dtype=float32", "--eval-every=0"]
    mid_train.main([*flags, "--tasks=gsm8k,arc_easy"])
    assert read_json(where.result_file("main", "mid"))["conversations"] == 40
    sft = [*flags, "--fresh-optimizer", f"--tasks=arc_easy,arc_challenge,hf:us/chats,{mine}"]
    chat_sft.main(sft)
    assert read_json(where.result_file("main", "sft"))["conversations"] == 56 - 5
    capsys.readouterr()
    chat_sft.main(sft)
    assert "already finished" in capsys.readouterr().out
    own(mine, 6)
    chat_sft.main(sft)
    assert "settings or inputs have changed" in capsys.readouterr().out
    assert read_json(where.result_file("main", "sft"))["conversations"] == 57 - 5
    with pytest.raises(UserError, match="exclude each other"):
        chat_sft.main([*sft, f"--data={mine}"])


def test_borders_make_packed_conversations_as_alone() -> None:
    """The same rows and targets; with borders each conversation has the loss it has alone, without not."""
    task = [{"messages": [{"role": "user", "content": "the " * i}, TALK[1]]} for i in range(1, 9)]
    rt, model = Runtime(torch.device("cpu"), torch.float32), small_model()
    with torch.no_grad():
        model.smear_lambda.fill_(1.0)  # it must not cross a border either
        model.blocks[0].attn.c_proj.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))

    def rows(borders: bool) -> list[Any]:
        how: dict[str, Any] = {"sequence_len": 64, "device_batch": 1, "rt": rt, "seed": 1, "epochs": 1}
        with ConversationBatches(task, TOK, borders=borders, **how) as batches:
            return list(batches)

    def losses(batch: Any) -> list[float]:
        hidden_TD = model.hidden(batch.inputs_BT, batch.doc_start_BT)[0].detach()
        return [round(float(x), 4) for x in model.token_nll(hidden_TD, batch.targets_BT[0]).detach()]

    alone = Counter[float]()
    for conversation in task:
        ids, mask = (torch.tensor(x) for x in TOK.render_conversation(conversation, None))
        hidden_TD = model.hidden(ids[None, :-1], None)[0].detach()
        nll = model.token_nll(hidden_TD, torch.where(mask[1:] == 1, ids[1:], -1)).detach()
        alone.update(round(float(x), 4) for x in nll[mask[1:] == 1])
    apart, together = rows(True), rows(False)
    assert len(apart) == len(together) > 1
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a.inputs_BT, b.inputs_BT) and torch.equal(a.targets_BT, b.targets_BT)
    packed, seen = (sorted(x for b in part for x in losses(b) if x) for part in (apart, together))
    assert packed == pytest.approx(sorted(alone.elements()), abs=3e-4)
    assert len(seen) == len(packed) and max(abs(x - y) for x, y in zip(seen, packed, strict=True)) > 0.01
