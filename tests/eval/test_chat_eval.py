"""Chat evaluation: intervals, letters by logits, answers without tool calls, and the stage."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_home import TOK, save_model
from hypothesis import given
from hypothesis import strategies as st

from nanochat import chat_format as chat
from nanochat.engine.engine import Completion
from nanochat.errors import UserError
from nanochat.eval.chat import chat_core, choose_letters, evaluate_task, wilson
from nanochat.eval.passk import bootstrap, pass_at_k, powers_up_to
from nanochat.home import Home, read_json
from nanochat.runtime import Runtime
from scripts import chat_eval
from tasks.eval_tasks import add_sandbox, open_tasks

RT = Runtime(torch.device("cpu"), torch.float32)

# ---------------------------------------------------------------- figures


def test_wilson_by_hand() -> None:
    """Values of the published example 8 of 10, and the closed form z^2 / (n + z^2) at the ends."""
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 20, z=2.0) == (0.0, pytest.approx(4 / 24))
    assert wilson(20, 20, z=2.0) == (pytest.approx(20 / 24), 1.0)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_ends_are_where_the_score_test_turns(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    p, z = right / total, 1.959964
    for end in wilson(right, total):
        if 0 < end < 1:
            assert (p - end) ** 2 == pytest.approx(z * z * end * (1 - end) / total, rel=1e-6, abs=1e-12)
    low, high = wilson(right, total)
    assert 0 <= low <= p <= high <= 1


def test_chat_core_is_centred_on_chance() -> None:
    facts = {"a": {"accuracy": 0.7, "chance": 0.25}, "b": {"accuracy": 0.1, "chance": 0.0}}
    assert chat_core(facts) == pytest.approx((0.45 / 0.75 + 0.1) / 2)
    assert chat_core({}) is None


# ---------------------------------------------------------------- tasks that answer to a script


def ask(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | more


class Quiz:
    def __init__(self, kind: str, conversations: list[dict[str, Any]]) -> None:
        self.kind, self.conversations = kind, conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.conversations[index]

    def evaluate(self, conversation: dict[str, Any], answer: str) -> bool:
        return answer == conversation["messages"][-1]["content"]


class ByLength:
    """Likes letters in an order that depends on the length of the prompt; likes "z" most of all."""

    def __init__(self, orders: dict[int, str]) -> None:
        self.orders = orders
        self.config = SimpleNamespace(vocab_size=TOK.get_vocab_size(), sequence_len=64)

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def forward_hidden(self, ids_BT: torch.Tensor, context: Any) -> torch.Tensor:
        return (torch.arange(ids_BT.shape[1]) + 1).expand(ids_BT.shape).unsqueeze(-1)

    def logits(self, length_B1: torch.Tensor) -> torch.Tensor:
        logits_BV = torch.zeros(len(length_B1), self.config.vocab_size)
        for logits_V, length in zip(logits_BV, length_B1[:, 0].tolist(), strict=True):
            for i, letter in enumerate("z" + self.orders[length]):
                logits_V[TOK.encode(letter)[0]] = 9 - i
        return logits_BV


def prompt_len(conversation: dict[str, Any]) -> int:
    return len(TOK.render_for_completion(conversation))


def letters_quiz() -> tuple[Quiz, ByLength]:
    quiz = Quiz(
        "categorical",
        [
            ask("q", "B", letters=["A", "B", "C", "D"]),
            ask("q1 q2", "A", letters=["A", "B", "C", "D"]),
            ask("q1 q2 q3 q4", "A", letters=["A", "B"]),
        ],
    )
    orders = dict(zip(map(prompt_len, quiz.conversations), ("BACD", "DABC", "CBA"), strict=True))
    assert len(orders) == 3
    return quiz, ByLength(orders)


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_letters_are_chosen_among_those_listed(batch_tokens: int) -> None:
    """B is liked best and right; D is, A would be right; the third would like C, but it is not on offer."""
    quiz, model = letters_quiz()
    assert choose_letters(model, TOK, quiz.conversations, batch_tokens) == ["B", "D", "B"]
    with pytest.raises(ValueError, match="one token"):
        choose_letters(model, TOK, [ask("q", "x", letters=["not one"])], 10)


class Rank:
    """One of two ranks; gather shows what both bring, once the other one has been there."""

    device, world_size = RT.device, 2

    def __init__(self, rank: int, seen: list[list[Any]]) -> None:
        self.rank, self.seen, self.calls = rank, seen, 0

    def gather(self, value: Any) -> list[Any]:
        self.calls += 1
        if self.rank == 0:
            self.seen.append([value])
            return [value]
        return [*self.seen[self.calls - 1], value]


def test_categorical_facts_and_ranks() -> None:
    quiz, model = letters_quiz()
    engine: Any = SimpleNamespace(model=model, tokenizer=TOK)
    facts, records = evaluate_task(quiz, engine, RT)
    assert (facts["right"], facts["total"], facts["chance"]) == (1, 3, 0.25)  # four letters are usual
    assert [r["right"] for r in records] == [True, False, False]
    assert records[1] == {
        "index": 1, "question": "q1 q2", "reference": "A", "answer": "D", "full": "D", "ended": "stop",
        "right": False,
    }  # fmt: skip
    assert evaluate_task(quiz, engine, RT, max_problems=1)[0]["accuracy"] == 1.0
    seen: list[list[Any]] = []
    evaluate_task(quiz, engine, Rank(0, seen))  # type: ignore[arg-type]
    shared, all_records = evaluate_task(quiz, engine, Rank(1, seen))  # type: ignore[arg-type]
    assert all_records == records and shared | {"seconds": 0} == facts | {"seconds": 0}


class Scripted:
    """An engine that answers each prompt with the ids it has for it."""

    context, tokenizer = 64, TOK

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers, self.seeds = answers, list[int]()

    def complete(self, prompts: list[list[int]], *, seed: list[int], **how: Any) -> list[Completion]:
        assert how == {"max_tokens": 9, "batch_size": 5, "temperature": 0.0}
        self.seeds += seed
        ids = [self.answers[tuple(prompt)] for prompt in prompts]
        return [Completion(each, [1] * len(each), "stop" if each else "length") for each in ids]


def test_generative_answers_are_text_without_the_tool() -> None:
    special, say = TOK.encode_special, TOK.encode
    call = [
        *say("It is "), special(chat.PYTHON_START), *say("1+2"), special(chat.PYTHON_END),
        special(chat.OUTPUT_START), *say("3"), special(chat.OUTPUT_END), *say("3."),
    ]  # fmt: skip
    quiz = Quiz("generative", [ask("a", "It is 3."), ask("b", "yes"), ask("long " * 80, ""), ask("c", "no")])
    prompts = [tuple(TOK.render_for_completion(c)) for c in quiz.conversations]
    engine: Any = Scripted({prompts[0]: call, prompts[1]: [], prompts[3]: say("no")})
    facts, records = evaluate_task(quiz, engine, RT, max_tokens=9, batch_size=5, seed=30)
    assert [r["answer"] for r in records] == ["It is 3.", "", "", "no"]
    assert [r["ended"] for r in records] == ["stop", "length", "prompt too long", "stop"]
    assert "1+2" in records[0]["full"] and "3.<" not in records[0]["answer"]
    assert [r["right"] for r in records] == [
        True,
        False,
        False,
        True,
    ]  # no answer is wrong even where "" is right
    assert (facts["num_unfinished"], facts["chance"], engine.seeds) == (2, 0.0, [30, 31, 33])


# ---------------------------------------------------------------- the stage

WORDS = ["--preset=smoke", "--device=cpu", "--max-problems=3", "--max-tokens=4"]


def test_every_chat_model_is_measured_once(home: Path, capsys: pytest.CaptureFixture) -> None:
    where = Home(home)
    for stage in ("base", "mid", "sft"):
        save_model(where, stage, sequence_len=400)
    chat_eval.main(WORDS)
    out = capsys.readouterr().out
    assert "chat_eval_mid: ChatCORE" in out and "chat_eval_sft: ChatCORE" in out
    facts = read_json(where.result_file("main", "chat_eval_sft"))
    assert list(facts["tasks"]) == ["arithmetic", "letters", "facts", "multiple_choice", "identity"]
    assert facts["parent"] == ["sft", "k", 7] and facts["tasks"]["multiple_choice"]["chance"] == 0.25
    for name, found in facts["tasks"].items():
        lines = (
            (where.stage_dir("main", "chat_eval_sft") / f"{name}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )
        records = [json.loads(line) for line in lines]
        assert len(records) == found["total"] == 3 and sum(r["right"] for r in records) == found["right"]
        assert found["low"] <= found["accuracy"] <= found["high"] and facts["examples"][name] == records

    chat_eval.main([*WORDS, "--stage=sft"])  # the same settings, said in another way
    assert "chat_eval_sft: already finished" in capsys.readouterr().out
    chat_eval.main([*WORDS, "--stage=sft", "--tasks=facts, identity"])
    assert "kept in chat_eval_sft-old-1" in capsys.readouterr().out
    assert list(read_json(where.result_file("main", "chat_eval_sft"))["tasks"]) == ["facts", "identity"]


def test_hub_tasks_follow_a_hub_mixture(home: Path) -> None:
    names = list(open_tasks("auto", {"mixture": "speedrun"}, Home(home)))
    assert names == ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"]
    assert "letters" in open_tasks("auto", {"mixture": "cpu-demo"}, Home(home))
    assert list(open_tasks("gsm8k,facts,gsm8k", {}, Home(home))) == ["gsm8k", "facts"]


def test_bad_words(home: Path) -> None:
    with pytest.raises(UserError, match="no chat model"):
        chat_eval.main(WORDS)
    save_model(Home(home), "sft")
    for words in (["--stage=best"], ["--stage=mid"], ["--tasks=facts,fact"], ["--stage=sft", "--step=8"]):
        with pytest.raises(UserError):
            chat_eval.main([*WORDS, *words])
    assert not (home / "runs" / "main" / "chat_eval_sft").exists()


# ---------------------------------------------------------------- several samples, and code


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one() -> None:
    """Against all subsets, and values by hand: of 5 answers 2 are right; 3 of 10 pairs hold none of them."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    for wrong in ((3, 4, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError):
            pass_at_k(*wrong)
    assert [powers_up_to(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_bootstrap_intervals() -> None:
    low, high = bootstrap([0.0] * 50 + [1.0] * 50)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62  # 0.5 -+ 1.96 * 0.05
    assert bootstrap([1.0, 1.0]) == (1.0, 1.0) and bootstrap([]) == (0.0, 1.0)


class Drawn:
    """An engine that answers right where the seed is even."""

    context, tokenizer = 64, TOK

    def complete(self, prompts: list[list[int]], *, seed: list[int], **how: Any) -> list[Completion]:
        assert how["temperature"] == 1.0 and len(set(seed)) == len(seed)
        texts = [TOK.encode("yes" if s % 2 == 0 else "no") for s in seed]
        return [Completion(ids, [1] * len(ids), "stop", 0) for ids in texts]


def test_several_samples_to_a_question() -> None:
    """Three questions, 4 samples each; total 3 is odd, so half of each question's seeds are even."""
    quiz = Quiz("generative", [ask("a", "yes"), ask("b", "yes"), ask("c", "maybe")])
    engine: Any = Drawn()
    facts, records = evaluate_task(quiz, engine, RT, temperature=1.0, num_samples=4)
    assert (facts["right"], facts["total"], facts["num_samples"]) == (4, 12, 4)
    assert facts["pass_at"] == {
        "1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3 * 5 / 6), "4": pytest.approx(2 / 3),
    }  # fmt: skip
    assert [r["index"] for r in records] == [0] * 4 + [1] * 4 + [2] * 4
    assert facts["low"] <= facts["accuracy"] <= facts["high"]


def test_samples_need_a_temperature(home: Path) -> None:
    save_model(Home(home), "sft", sequence_len=400)
    with pytest.raises(UserError, match="temperature"):
        chat_eval.main([*WORDS, "--num-samples=4"])


def test_code_tasks_without_a_sandbox(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto leaves them out and says so; asked for by name they are an error; unsafe runs them."""
    said: list[str] = []
    monkeypatch.setattr("nanochat.sandbox.sandbox.Sandbox.probe", lambda self: "no walls here")
    tasks = open_tasks("gsm8k,humaneval", {}, Home(home))
    with pytest.raises(UserError, match="no walls here"):
        add_sandbox(dict(tasks), False, False, said.append)
    assert add_sandbox(tasks, True, False, said.append).keys() == {"humaneval"} and list(tasks) == ["gsm8k"]
    assert "humaneval left out" in said[0] and "--unsafe-no-sandbox" in said[0]
    unsafe = open_tasks("humaneval", {}, Home(home))
    assert add_sandbox(unsafe, False, True, said.append) == {} and "without a sound sandbox" in said[1]
    assert unsafe["humaneval"].sandbox is not None  # type: ignore[attr-defined]
