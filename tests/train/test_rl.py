"""The RL stage: it raises the reward, resumes exactly, and leaves its facts; the tasks it practises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rl_cases import Short
from helpers.rollout_cases import Checksums
from helpers.small_home import save_model

from nanochat import load as models
from nanochat.corpus.numbers import is_held_out
from nanochat.errors import UserError
from nanochat.home import Home, read_json
from nanochat.run_dir import read_metrics
from nanochat.train.rollout import rewards_of
from scripts import chat_rl
from tasks.base import reference
from tasks.reinforce import Goal, HeldOutSums, Practice, goal, is_story
from tasks.synthetic import Arithmetic, last_number

FLAGS = ["--preset=smoke", "--device=cpu", "--dtype=float32", "--keep=9"]


@pytest.fixture
def ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    save_model(Home(home), "sft")
    monkeypatch.setattr(chat_rl, "goal", lambda *args, **more: Goal(Short(6), {"short": Short(3)}))  # type: ignore[arg-type]
    return Home(home)


def rows(where: Home, *keys: str) -> list[dict[str, Any]]:
    kept = [row for row in read_metrics(where.metrics_file("main", "rl")) if keys[0] in row]
    return [{k: row[k] for k in ("step", *keys)} for row in kept]


@pytest.mark.slow
def test_the_reward_rises_and_facts_are_left(ready: Home) -> None:
    chat_rl.main([*FLAGS, "--steps=60", "--questions=4", "--samples=8", "--lr-scale=8", "--eval-every=30"])
    rewards = [row["reward"] for row in rows(ready, "reward", "kl", "same_frac", "answer_tokens")]
    assert len(rewards) == 60 and sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1, rewards
    assert [row["step"] for row in rows(ready, "accuracy", "accuracy_short", "pass_at_2_short")] == [
        0,
        30,
        60,
    ]
    result = read_json(ready.result_file("main", "rl"))
    assert result["reward"] == pytest.approx(sum(rewards[-10:]) / 10) and result["parent"] == ["sft", "k", 7]
    assert result["steps"] == 60 and "accuracy" in result["before"] and result["num_questions"] == 6
    assert models.newest_stage(ready, "main") == "rl"


@pytest.mark.parametrize("more", [[], ["--updates=3", "--clip=0.2", "--kl=0.1", "--by-std", "--refill=1"]])
def test_a_run_that_was_stopped_ends_the_same(
    ready: Home, more: list[str], capsys: pytest.CaptureFixture
) -> None:
    """From step 2, which with three updates lies inside a round, to the same figures bit for bit."""
    flags = [*FLAGS, "--steps=6", "--samples=6", "--lr-scale=1", *more]
    chat_rl.main(flags)
    names = ("loss", "grad_norm", "tokens")
    straight, rewards = rows(ready, *names), rows(ready, "reward", "kl", "same_frac", "groups")
    ready.result_file("main", "rl").unlink()
    chat_rl.main([*flags, "--resume=2"])
    assert "continuing from step 2" in capsys.readouterr().out
    assert rows(ready, *names) == straight and len(straight) == 6
    assert rows(ready, "reward", "kl", "same_frac", "groups") == rewards and len(rewards) == 6
    chat_rl.main(flags)
    assert "already finished" in capsys.readouterr().out


def test_practice_is_graded_by_its_last_number() -> None:
    task = Practice(("arithmetic", "letters"), 6, seed=3)
    assert len(task) == 6
    for conversation in (task[i] for i in range(6)):
        answer = conversation["messages"][-1]["content"][-1]["text"]
        number = last_number(answer)
        assert number is not None
        assert task.reward(conversation, answer) == 1.0 == task.reward(conversation, number)
        assert task.reward(conversation, f"{int(number) + 1}") == 0.0 == task.reward(conversation, "none")
    assert "count" in task[1]["messages"][-1]["content"][0]["text"]


def test_word_problems_are_told_from_sums() -> None:
    """Practice asks word problems only, all different; the new held-out ones share nothing with training."""
    task = Practice(("stories",), 40, seed=2)
    asked = [task[i]["messages"][0]["content"] for i in range(40)]
    assert all("how many" in q.lower() for q in asked) and len(set(asked)) == 40
    assert asked == [Practice(("stories",), 40, seed=2)[i]["messages"][0]["content"] for i in range(40)]
    committed = {record["code"] for record in Arithmetic().records}
    seen: set[str] = set()
    for stories in (True, False):
        held_out = HeldOutSums(stories, 60)
        for conv in (held_out[i] for i in range(60)):
            code = conv["messages"][-1]["content"][0]["text"]
            a, _, b = code.split()
            assert is_held_out(int(a), int(b)) and code not in committed
            assert is_story(conv["messages"][0]["content"]) == stories
            assert held_out.evaluate(conv, reference(conv)) and not held_out.evaluate(
                conv, "The answer is -1."
            )
            seen.add(code)
    assert len(seen) > 110


class Together(Checksums):
    """Grades many answers at once, and one alone never."""

    def evaluate_many(self, pairs: list[tuple[Any, str]]) -> list[bool]:
        return ["e" in answer for _, answer in pairs]

    def reward(self, conversation: Any, answer: str) -> float:
        raise AssertionError


def test_rewards_of_answers_that_are_graded_together() -> None:
    task = Together(3)
    assert rewards_of(task, task[0], ["see", "no", "", "e"]) == [1.0, 0.0, 0.0, 1.0]
    assert rewards_of(Short(3), task[0], ["see", "no"]) == [1.0, 0.0]


def test_programs_are_a_goal(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MBPP's rows of our own, graded in the sandbox as rewards."""
    row = {
        "text": "Write a function to add one.", "test_setup_code": "",
        "code": "def inc(x):\n    return x + 1", "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"],
    }  # fmt: skip
    for split in ("train", "test"):
        path = tmp_path / f"mirror/datasets/google-research-datasets/mbpp/full/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), path)
    monkeypatch.setenv("NANOCHAT_MIRROR", str(tmp_path / "mirror"))
    try:
        aim = goal("mbpp", size=1, home=Home(home))
    except UserError as error:
        pytest.skip(f"not run: {error.problem}")
    answers = [
        "def inc(x): return x + 1", "```python\ndef inc(x):\n    return 1 + x\n```", "def inc(x): return 2",
        "import sys; sys.exit(0)", "",
    ]  # fmt: skip
    assert rewards_of(aim.train, aim.train[0], answers) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert list(aim.held_out) == ["mbpp"]


def test_goals(home: Path) -> None:
    numbers = goal("numbers", size=10)
    assert list(numbers.held_out) == ["arithmetic", "letters"] and len(numbers.train) == 10
    heldout = {
        c["messages"][0]["content"] for t in numbers.held_out.values() for c in (t[i] for i in range(len(t)))
    }
    asked = {numbers.train[i]["messages"][0]["content"] for i in range(10)}
    assert not asked & heldout
    with pytest.raises(UserError, match="choose from") as caught:
        goal("poetry", size=1)
    assert "poetry" in str(caught.value.problem)
    for wrong in ("--samples=1", "--questions=0", "--kl=-1"):
        with pytest.raises(UserError, match="a round needs"):
            chat_rl.main([*FLAGS, wrong])
