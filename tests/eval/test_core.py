"""CORE: the three types by hand, batching against the obvious way, the bundle, the stage."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.core_bundle import CORE_YAML, mirror  # noqa: F401
from helpers.small_home import TOK, save_model
from hypothesis import given
from hypothesis import strategies as st

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.eval import core
from nanochat.eval.core import CoreTask
from nanochat.eval.rows import hidden_states, last_logits, padded_batches, score_endings
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home, read_json
from nanochat.runtime import Runtime
from scripts import base_eval

RT = Runtime(torch.device("cpu"), torch.float32)
ALPHABET = "^abcde \n"  # ^ is BOS


class Letters:
    """A token per character."""

    def get_bos_token_id(self) -> int:
        return 0

    def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *map(ALPHABET.index, text)] for text in texts]


class Bigrams:
    """P(next | current) from a table such as {"ab": 0.5}; what a row lacks of 1 is shared by the rest."""

    def __init__(self, table: dict[str, float], sequence_len: int = 64) -> None:
        V = len(ALPHABET)
        self.config = SimpleNamespace(vocab_size=V, sequence_len=sequence_len)
        self.table_VV = torch.full((V, V), math.nan)
        for pair, p in table.items():
            self.table_VV[ALPHABET.index(pair[0]), ALPHABET.index(pair[1])] = p
        for row_V in self.table_VV:
            unknown = row_V.isnan()
            row_V[unknown] = (1 - row_V[~unknown].sum()) / unknown.sum()

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def forward_hidden(self, ids_BT: torch.Tensor, context: Any) -> torch.Tensor:
        return ids_BT.unsqueeze(-1)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self.table_VV[hidden_ND[..., 0]].log()


def task(kind: str, **more: Any) -> CoreTask:
    return CoreTask(
        **{"name": "t", "kind": kind, "file": Path(), "num_shots": 0, "delimiter": " ", "chance": 0.0} | more
    )


def outcome(t: CoreTask, record: dict[str, Any], model: Any) -> tuple[list[float], bool]:
    """(mean nll of each scored row in units of ln 2, whether the answer is right)."""
    rows = core.scored_rows(t, Letters().encode(core.prompts(t, [record], 0), 0))
    scores = score_endings(model, rows, 1000)
    return [nll / math.log(2) for nll, _ in scores], core.is_right(t, record, scores)


# ---------------------------------------------------------------- by hand


def test_multiple_choice_takes_the_lowest_mean() -> None:
    """ "bc" costs 1 and 2 bits, "d" costs 2: the mean prefers "bc" (1.5), the sum would prefer "d"."""
    model = Bigrams({" b": 0.5, " d": 0.25, "bc": 0.25})
    record = {"query": "a", "choices": ["d", "bc"], "gold": 1}
    assert outcome(task("multiple_choice"), record, model) == (pytest.approx([2.0, 1.5]), True)
    assert not outcome(task("multiple_choice"), record | {"gold": 0}, model)[1]


def test_multiple_choice_starts_after_the_common_prefix() -> None:
    """The shared "e" is not scored, however unlikely; "ca" and "db" are: (2 + 1) / 2 and (1 + 3) / 2 bits."""
    model = Bigrams({"ec": 0.25, "ca": 0.5, "ed": 0.5, "db": 0.125, " e": 1e-6})
    record = {"query": "a", "choices": ["eca", "edb"], "gold": 0}
    assert outcome(task("multiple_choice"), record, model) == (pytest.approx([1.5, 2.0]), True)


def test_schema_scores_the_common_ending() -> None:
    """Common to "ba d" and "ca d" is "a d": bits of a, space and d, where only a depends on the context."""
    model = Bigrams({"ba": 0.25, "ca": 0.5, "a ": 0.5, " d": 0.5})
    record = {"context_options": ["ba", "ca"], "continuation": "d", "gold": 1}
    assert outcome(task("schema"), record, model) == (pytest.approx([4 / 3, 1.0]), True)
    assert not outcome(task("schema"), record | {"gold": 0}, model)[1]


@pytest.mark.parametrize(
    ("continuation", "right"), [("bcc", True), ("bca", False), ("acc", False), ("b", True)]
)
def test_language_modelling_wants_every_token(continuation: str, right: bool) -> None:
    """The likeliest: b after a space, c after b, c after c. The context's own spaces are stripped."""
    model = Bigrams({" b": 0.4, "bc": 0.4, "cc": 0.4, "a ": 0.9})
    record = {"context": " a \n", "continuation": continuation}
    assert core.prompts(task("language_modeling"), [record], 0) == ["a", f"a {continuation}"]
    assert outcome(task("language_modeling"), record, model)[1] is right


def test_language_modelling_refuses_a_prompt_that_is_no_prefix() -> None:
    for encoded in ([[0, 1, 2], [0, 1, 3, 4]], [[0, 1], [0, 1]]):
        with pytest.raises(ValueError, match="must begin"):
            core.scored_rows(task("language_modeling"), encoded)


def test_an_ending_never_vanishes() -> None:
    """One choice begins another, contexts are equal: one token is scored all the same."""
    assert [start for _, start in core.scored_rows(task("multiple_choice"), [[0, 1, 2], [0, 1, 2, 3]])] == [
        2,
        2,
    ]
    assert [start for _, start in core.scored_rows(task("schema"), [[0, 1, 2], [0, 1, 2]])] == [1, 1]
    assert [start for _, start in core.scored_rows(task("schema"), [[0, 1], [0, 2]])] == [1, 1]
    with pytest.raises(ValueError, match="at least one"):
        score_endings(Bigrams({}), [([0, 1], 2)], 10)


# ---------------------------------------------------------------- shots and templates


@given(st.integers(2, 40), st.data())
def test_shots_are_drawn_from_the_list_of_the_others(num_records: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, num_records - 1))
    others = [i for i in range(num_records) if i != index]
    wanted = random.Random(1234 + index).sample(others, min(10, len(others)))
    assert core.shots(index, num_records, 10) == wanted


def test_templates() -> None:
    records = [{"query": f"q{i}", "choices": ["x", "y"], "gold": i % 2} for i in range(3)]
    a, b = core.shots(0, 3, 2)
    t = task("multiple_choice", num_shots=2, delimiter="\nAnswer: ")
    before = "".join(f"q{i}\nAnswer: {'xy'[i % 2]}\n\n" for i in (a, b))
    assert core.prompts(t, records, 0) == [f"{before}q0\nAnswer: x", f"{before}q0\nAnswer: y"]
    said = [{"context": f" c{i} ", "continuation": f"d{i}"} for i in range(2)]
    t = task("language_modeling", num_shots=1, delimiter="\nAnswer: ")
    shot = "c1\nAnswer: d1\n\n"
    assert core.prompts(t, said, 0) == [f"{shot}c0\nAnswer:", f"{shot}c0\nAnswer: d0"]
    schemas = [{"context_options": ["l", "r"], "continuation": "z", "gold": 1}] * 2
    assert core.prompts(task("schema", num_shots=1), schemas, 0) == ["r z\n\nl z", "r z\n\nr z"]


def test_records_are_shuffled_then_capped(tmp_path: Path) -> None:
    t = task("schema", file=tmp_path / "f.jsonl")
    t.file.write_text("".join(f'{{"i": {i}, "text": "\u2028"}}\n' for i in range(9)), encoding="utf-8")
    order = list(range(9))
    random.Random(1337).shuffle(order)
    assert [r["i"] for r in core.read_records(t)] == order
    assert [r["i"] for r in core.read_records(t, 4)] == order[:4]


# ---------------------------------------------------------------- batching == one by one, on a real network


def network() -> GPT:
    model = GPT(GPTConfig(48, 40, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return model.eval()


MODEL = network()


def row(length: int) -> list[int]:
    return torch.randint(40, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.no_grad()
def test_endings_equal_the_obvious_way() -> None:
    rows = [(row(n), start) for n, start in ((5, 1), (48, 40), (9, 8), (30, 12), (9, 3), (47, 46))]
    scores = score_endings(MODEL, rows, 100)
    for (ids, start), (nll, is_greedy) in zip(rows, scores, strict=True):
        logits_TV = MODEL(torch.tensor([ids]))[0]
        each = [-float(logits_TV[t - 1].log_softmax(-1)[ids[t]]) for t in range(start, len(ids))]
        assert nll == pytest.approx(sum(each) / len(each), abs=1e-4)
        assert is_greedy == all(int(logits_TV[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))
    best = [int(MODEL(torch.tensor([row(9)]))[0, -1].argmax())]
    assert score_endings(MODEL, [(row(9) + best, 9)], 1)[0][1]
    for indices, logits_BV in last_logits(MODEL, [ids for ids, _ in rows], 60):
        for i, logits_V in zip(indices, logits_BV, strict=True):
            torch.testing.assert_close(logits_V, MODEL(torch.tensor([rows[i][0]]))[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_longer_than_the_context_are_not_cut() -> None:
    torch.testing.assert_close(
        hidden_states(MODEL, torch.tensor([row(48)])), MODEL.hidden(torch.tensor([row(48)]))
    )
    ids = row(130)
    long = GPT(dataclasses.replace(MODEL.config, sequence_len=130, window_pattern="L"))
    long.load_state_dict(MODEL.state_dict())
    narrow = hidden_states(MODEL, torch.tensor([ids]))
    torch.testing.assert_close(narrow[:, :48], long.hidden(torch.tensor([ids]))[:, :48], atol=1e-4, rtol=0)
    assert narrow.shape == (1, 130, 32) and narrow.isfinite().all()
    assert not torch.allclose(
        narrow[:, -1], long.hidden(torch.tensor([ids]))[:, -1], atol=1e-3
    )  # windows stay


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 90))
def test_batches_hold_each_row_once(lengths: list[int], budget: int) -> None:
    rows = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    seen = []
    for indices, ids_BT in padded_batches(rows, budget):
        assert ids_BT.numel() <= budget or len(indices) == 1
        assert [ids_BT[b, : lengths[i]].tolist() for b, i in enumerate(indices)] == [rows[i] for i in indices]
        seen += indices
    assert sorted(seen) == list(range(len(rows)))


class Rank:
    """One of two ranks whose gather stays at home."""

    device, world_size = RT.device, 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_tasks_are_shared_by_ranks() -> None:
    """a is likelier than b, so golds 0 are right: 3 of 5; chance 0.2 -> (0.6 - 0.2) / 0.8."""
    model = Bigrams({" a": 0.5, " b": 0.3}, sequence_len=3)
    records = [{"query": "e" * (i // 4), "choices": ["a", "b"], "gold": int(i in (1, 4))} for i in range(5)]
    t = task("multiple_choice", chance=0.2)
    whole = core.evaluate_task(t, records, model, Letters(), RT, batch_tokens=7)
    assert (whole["accuracy"], whole["centred"], whole["total"]) == (0.6, pytest.approx(0.5), 5)
    assert whole["num_long"] == 1  # ^ e space a: four tokens
    parts = [core.evaluate_task(t, records, model, Letters(), Rank(r)) for r in (0, 1)]  # type: ignore[arg-type]
    assert [p["total"] for p in parts] == [3, 2]
    assert sum(p["accuracy"] * p["total"] for p in parts) == pytest.approx(3)


# ---------------------------------------------------------------- the bundle and the stage


def test_bundle_is_unpacked_and_read(home: Path, mirror: Path) -> None:
    where = Home(home)
    tasks, missing = core.load_tasks(core.find_bundle(where, mirror=str(mirror), offline=True))
    assert missing == ["lost"]
    facts = [(t.name, t.kind, t.num_shots, t.delimiter, t.chance) for t in tasks]
    assert facts == [
        ("pick", "multiple_choice", 1, "\nAnswer: ", 0.5),
        ("say", "language_modeling", 0, " ", 0.0),
    ]
    assert (
        core.find_bundle(where, offline=True) == where.eval_bundle_dir
    )  # once unpacked, no source is needed
    before = core.fingerprint(tasks)
    tasks[0].file.write_text("{}\n")
    assert core.fingerprint(tasks) != before
    (where.eval_bundle_dir / "eval_meta_data.csv").write_text("Eval Task,Random baseline\npick,50\n")
    with pytest.raises(UserError, match=r"cannot be read.*say"):
        core.load_tasks(where.eval_bundle_dir)


def test_damaged_bundle_leaves_nothing_behind(home: Path, mirror: Path) -> None:
    (mirror / "eval_bundle.zip").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match="cannot be unpacked"):
        core.find_bundle(Home(home), mirror=str(mirror), offline=True)
    assert not list(home.glob("*eval_bundle*"))


def test_stage_without_then_with_core(home: Path, mirror: Path, capsys: pytest.CaptureFixture) -> None:
    where = Home(home)
    save_model(where)
    words = ["--preset=smoke", "--device=cpu", "--dtype=float32", "--eval-tokens=512", "--max-per-task=4"]
    base_eval.main(words)
    facts = read_json(where.result_file("main", "base_eval"))
    assert facts["core"] is None and facts["core_tasks"] == {} and facts["core_note"]
    assert capsys.readouterr().out.count("CORE not run: ") == 1
    assert facts["val_rows"] == 8 and 0 < facts["val_bpb"] < 9
    assert len(facts["samples"]) == len(base_eval.PROMPTS) and facts["parent"] == ["base", "k", 7]

    base_eval.main(words)
    assert "already finished" in capsys.readouterr().out

    base_eval.main([*words, f"--mirror={mirror}"])  # the data is here now: measured anew
    out = capsys.readouterr().out
    facts = read_json(where.result_file("main", "base_eval"))
    pick, say = facts["core_tasks"]["pick"], facts["core_tasks"]["say"]
    assert (pick["total"], say["total"], say["accuracy"]) == (4, 3, 0.0)
    assert facts["core"] == pytest.approx((2 * pick["accuracy"] - 1 + 0) / 2)
    assert facts["core_missing"] == ["lost"] and "without lost" in out and "at most 4" in facts["core_note"]

    base_eval.main([*words, f"--mirror={mirror}"])
    assert "already finished" in capsys.readouterr().out


def test_stage_without_a_model_says_so(home: Path) -> None:
    with pytest.raises(UserError, match="no base checkpoint"):
        base_eval.main(["--preset=smoke", "--device=cpu", "--dtype=float32"])


# ---------------------------------------------------------------- results that are kept


def test_results_are_kept_by_weights_and_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second evaluation computes nothing; other weights, records or caps are computed anew."""
    file = tmp_path / "t.jsonl"
    records = [{"query": "a", "choices": ["d", "bc"], "gold": gold} for gold in (0, 1, 1, 1)]
    file.write_text("\n".join(map(json.dumps, records)))
    one = task("multiple_choice", file=file, chance=0.5)
    model, rt = Bigrams({" b": 0.5, " d": 0.25, "bc": 0.25}), Runtime(torch.device("cpu"), torch.float32)
    calls: list[str] = []
    real = core.evaluate_task

    def counted(task: CoreTask, *rest: Any, **more: Any) -> dict[str, Any]:
        calls.append(task.name)
        return real(task, *rest, **more)

    monkeypatch.setattr(core, "evaluate_task", counted)
    cache, said = tmp_path / "cache" / "x.json", list[str]()
    first = core.evaluate_core([one], model, Letters(), rt, cache=cache)
    again = core.evaluate_core([one], model, Letters(), rt, cache=cache, say=said.append)
    assert first == again and first["core"] == pytest.approx(0.5) and calls == ["t"] and "known" in said[0]
    core.evaluate_core([one], model, Letters(), rt, cache=cache, max_per_task=2)
    file.write_text(file.read_text() + "\n" + json.dumps(records[0]))
    assert core.evaluate_core([one], model, Letters(), rt, cache=cache)["tasks"]["t"]["total"] == 5
    core.evaluate_core([one], model, Letters(), rt)
    assert len(calls) == 4


def test_the_cache_is_named_by_the_weights(home: Path) -> None:
    where = Home(home)
    save_model(where, "base")
    save_model(where, "mid")
    save_model(where, "sft", sequence_len=32)  # the same weights
    names = []
    for stage in ("base", "mid"):
        found = checkpoint.load(where.checkpoints("main", stage), repair=False, only="model")
        assert found is not None
        names += [
            core.cache_file(where, found.records, TOK, dtype) for dtype in (torch.float32, torch.bfloat16)
        ]
    assert names[:2] == names[2:] and names[0] != names[1]
    other = {name: record | {"sha256": "0"} for name, record in found.records.items()}
    assert core.cache_file(where, other, TOK, torch.float32) != names[0]


def test_references_come_with_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "openai-community-gpt2.csv").write_text(
        "Task      , Accuracy , Centered\nt , 0.5 , 0.25\nCORE , , 0.1138\n"
    )
    assert core.references(tmp_path) == {"gpt2": {"t": 0.25, "CORE": 0.1138}}
