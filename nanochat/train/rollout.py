"""On-policy batches for RL: questions in, answers by the engine, rewards, token weights out.

A round takes `questions` new questions, writes `samples` answers to each with the present weights at
temperature 1 (the distribution that is scored), and serves `updates` optimizer steps. Groups whose rewards
are all equal teach nothing and are dropped. Every rank writes answers to its share of the questions; then all
know all answers, so that rows can be dealt out by length and one rank's checkpoint holds a whole round.
Letters: B rows, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nanochat.data.loader import IGNORED, Batch
from nanochat.engine import Completion, Engine
from nanochat.engine.detokenizer import answer_of
from nanochat.runtime import Runtime
from nanochat.train.policy import advantages, kl_estimate, log_probs, token_weights


class Rewarded(Protocol):
    """Questions with a reward for an answer's text, such as a task."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...

    def reward(self, conversation: Any, answer: str, /) -> float: ...


@dataclass(frozen=True)
class RoundPlan:
    """What a round is: counts over all ranks, except `device_batch` (rows of one forward and backward pass).

    clip 0 and kl 0 leave those terms out; refill: how many more times as many questions may be asked to
    replace dropped groups.
    """

    questions: int
    samples: int
    max_tokens: int
    device_batch: int
    updates: int = 1
    clip: float = 0.0
    kl: float = 0.0
    by_std: bool = False
    refill: int = 0
    engine_batch: int = 256
    seed: int = 1

    def __post_init__(self) -> None:
        whole = (self.questions, self.max_tokens, self.device_batch, self.updates, self.engine_batch)
        if min(whole) < 1 or self.samples < 2 or min(self.refill, self.clip, self.kl) < 0:
            raise ValueError(
                "a round needs 1 question, 2 samples, 1 token, 1 row, 1 update at least, nothing negative; "
                f"found {self}"
            )

    def accum(self, world_size: int) -> int:
        """Micro-batches of a step on every rank."""
        return math.ceil(math.ceil(self.questions * self.samples / self.device_batch) / world_size)


@dataclass
class Row:
    """One answer: prompt, what was written, the token that ended it; mask 1 where the policy chose."""

    ids: list[int]
    mask: list[int]
    advantage: float
    old: list[float] | None = None  # log p of ids[1:] when it was written; only for several updates


@dataclass(frozen=True)
class Group:
    """All answers to one question."""

    prompt: list[int]
    answers: list[Completion]
    rewards: list[float]


def row_of(prompt: Sequence[int], answer: Completion, advantage: float) -> Row:
    """Prompt and forced tool output get mask 0; the sampled stop token is kept, with mask 1."""
    stop = [] if answer.stop_id is None else [answer.stop_id]
    ids = [*prompt, *answer.ids, *stop]
    return Row(ids, [0] * len(prompt) + answer.mask + [1] * len(stop), advantage)


def question_at(position: int, total: int, seed: int) -> int:
    """Question number `position` of an endless sequence of passes, each in an order of its own."""
    epoch, place = divmod(position, total)
    return int(np.random.default_rng([seed, epoch]).permutation(total)[place])


def ask(engine: Engine, task: Rewarded, positions: Sequence[int], plan: RoundPlan) -> list[Group]:
    """A group per position. A sample's seed follows from its global number alone, so ranks change nothing.

    A prompt that fills the context gets no answers and belongs to no group.
    """
    conversations = [task[question_at(p, len(task), plan.seed)] for p in positions]
    prompts = [engine.tokenizer.render_for_completion(c) for c in conversations]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.context]
    S = plan.samples
    done = engine.complete(
        [prompts[i] for i in fits for _ in range(S)],
        max_tokens=plan.max_tokens,
        temperature=1.0,
        seed=[(plan.seed << 40) + positions[i] * S + s for i in fits for s in range(S)],
        batch_size=plan.engine_batch,
    )
    groups = []
    for n, i in enumerate(fits):
        answers = done[n * S : (n + 1) * S]
        texts = [answer_of(a.ids, engine.tokenizer) for a in answers]
        groups.append(Group(prompts[i], answers, rewards_of(task, conversations[i], texts)))
    return groups


def rewards_of(task: Rewarded, conversation: Any, texts: Sequence[str]) -> list[float]:
    """The reward of each answer to a question; graded together where the task can, as programs are."""
    grade = getattr(task, "evaluate_many", None)
    if grade is None:
        return [task.reward(conversation, text) for text in texts]
    return [float(right) for right in grade([(conversation, text) for text in texts])]


class Rollouts:
    """An endless iterator of micro-batches: `plan.accum(world)` of them are one optimizer step.

    `results` describe the step whose batches were made last, for the metrics. With a `reference` model the
    distance from it is measured (and penalised by plan.kl).
    """

    def __init__(
        self,
        engine: Engine,
        task: Rewarded,
        plan: RoundPlan,
        rt: Runtime,
        *,
        reference: Any = None,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        self.engine, self.task, self.plan, self.rt, self.reference = engine, task, plan, rt, reference
        self.position = 0 if cursor is None else int(cursor["position"])
        self.update = 0 if cursor is None else int(cursor["update"])
        self.rows: list[Row] = [] if cursor is None else _unpack(cursor["rows"])
        self.results: dict[str, float] = {} if cursor is None else dict(cursor.get("facts", {}))
        if not len(task):
            raise ValueError("RL needs at least one question, found none")

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.update == 0:
                self._write()
            yield from self._step()

    def cursor(self) -> dict[str, Any]:
        """Where to go on after the step made last; inside a round its answers and results come along."""
        rows, results = (self.rows, dict(self.results)) if self.update else ([], {})
        return {"position": self.position, "update": self.update, "rows": _pack(rows), "facts": results}

    def _write(self) -> None:
        """Ask a round's questions with the present weights; keep up to plan.questions groups that differ."""
        begun, plan, rt = time.perf_counter(), self.plan, self.rt
        asked: list[Group] = []
        kept: list[tuple[Group, list[float]]] = []
        for _ in range(1 + plan.refill):
            positions = range(self.position, self.position + plan.questions)
            self.position += plan.questions
            parts = rt.gather(ask(self.engine, self.task, positions[rt.rank :: rt.world_size], plan))
            groups = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
            asked += groups
            found = [(group, advantages(group.rewards, plan.by_std)) for group in groups]
            kept += [(group, values) for group, values in found if values is not None]
            if len(kept) >= plan.questions:
                break
        kept = kept[: plan.questions]
        rows = [
            row_of(group.prompt, answer, value)
            for group, values in kept
            for answer, value in zip(group.answers, values, strict=True)
        ]
        self.rows = sorted(rows, key=lambda row: -len(row.ids))
        self.results = _round_results(asked, len(kept)) | {"rollout_seconds": time.perf_counter() - begun}

    def _step(self) -> list[Batch]:
        """This rank's micro-batches of one optimizer step, weighted with the present weights."""
        plan, rt = self.plan, self.rt
        accum, B = plan.accum(rt.world_size), plan.device_batch
        chunks = [self.rows[i : i + B] for i in range(0, len(self.rows), B)]
        mine = chunks[rt.rank :: rt.world_size]
        needs_scores = plan.updates > 1 or self.reference is not None
        sums = torch.zeros(3, dtype=torch.float64)  # tokens, clipped, KL
        batches = []
        for chunk in mine:
            batch, advantage_BT = make_batch(chunk, rt.device)
            if needs_scores:
                sums += self._weigh(batch, advantage_BT, chunk)
            else:
                batch.weights_BT = advantage_BT
            batches.append(batch)
        if plan.updates > 1 and self.update == 0:
            self._share_scores(mine)
        batches += [blank_batch(rt.device) for _ in range(accum - len(batches))]
        if needs_scores:
            tokens, clipped, kl = rt.sum(sums.to(rt.device) if rt.world_size > 1 else sums).tolist()
            self.results["clip_frac"] = clipped / max(tokens, 1)
            if self.reference is not None:
                self.results["kl"] = kl / max(tokens, 1)
        self.update = (self.update + 1) % plan.updates
        batches[-1].resume = self.cursor
        return batches

    def _weigh(self, batch: Batch, advantage_BT: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Set the batch's weights by a scoring pass; (tokens, clipped, sum of KL)."""
        plan, inputs_BT, targets_BT = self.plan, batch.inputs_BT, batch.targets_BT
        new_BT = log_probs(self.engine.model, inputs_BT, targets_BT)
        if rows[0].old is None:
            old_BT = new_BT
            if plan.updates > 1:
                for row, values in zip(rows, new_BT.tolist(), strict=True):
                    row.old = values[: len(row.ids) - 1]
        else:
            old_BT = torch.zeros_like(new_BT)
            for b, row in enumerate(rows):
                old_BT[b, : len(row.ids) - 1] = torch.tensor(row.old)
        reference_BT = None
        if self.reference is not None:
            reference_BT = log_probs(self.reference, inputs_BT, targets_BT)
        weights_BT, is_clipped_BT = token_weights(
            advantage_BT, new_BT, old_BT, reference_BT, plan.clip, plan.kl
        )
        is_target_BT = targets_BT != IGNORED
        batch.weights_BT = weights_BT * is_target_BT
        distance = 0.0 if reference_BT is None else float(kl_estimate(new_BT, reference_BT).double().sum())
        clipped = float((is_clipped_BT & is_target_BT).sum())
        return torch.tensor([float(batch.num_targets), clipped, distance], dtype=torch.float64)

    def _share_scores(self, mine: Sequence[Sequence[Row]]) -> None:
        """Every rank learns the scores of every row, so that any of them can save and continue the round."""
        parts = self.rt.gather([[row.old for row in chunk] for chunk in mine])
        W, B = self.rt.world_size, self.plan.device_batch
        for i, row in enumerate(self.rows):
            chunk, place = divmod(i, B)
            row.old = parts[chunk % W][chunk // W][place]


def make_batch(rows: Sequence[Row], device: torch.device) -> tuple[Batch, torch.Tensor]:
    """(batch without weights, advantages (B, T)) of rows, padded on the right where nothing is a target."""
    T = max(len(row.ids) for row in rows) - 1
    inputs_BT = torch.zeros((len(rows), T), dtype=torch.int64)
    targets_BT = torch.full((len(rows), T), IGNORED, dtype=torch.int64)
    for b, row in enumerate(rows):
        size = len(row.ids) - 1
        ids, mask = torch.tensor(row.ids), torch.tensor(row.mask)
        inputs_BT[b, :size] = ids[:-1]
        targets_BT[b, :size] = torch.where(mask[1:] == 1, ids[1:], IGNORED)
    advantage_BT = torch.tensor([row.advantage for row in rows]).unsqueeze(1).expand(-1, T).contiguous()
    count = int((targets_BT != IGNORED).sum())
    return Batch(inputs_BT, targets_BT, num_targets=count).to(device), advantage_BT.to(device)


def blank_batch(device: torch.device) -> Batch:
    """One token and no target: what a rank computes where it has no rows left."""
    inputs_BT = torch.zeros((1, 1), dtype=torch.int64)
    targets_BT = torch.full((1, 1), IGNORED, dtype=torch.int64)
    return Batch(inputs_BT, targets_BT, weights_BT=torch.zeros((1, 1))).to(device)


def _round_results(groups: Sequence[Group], num_kept: int) -> dict[str, float]:
    rewards = [reward for group in groups for reward in group.rewards]
    answers = [answer for group in groups for answer in group.answers]
    if not rewards:
        return {"reward": 0.0, "questions": 0, "same_frac": 0.0, "groups": 0}
    same = [group.rewards for group in groups if advantages(group.rewards) is None]
    sampled = sum(sum(a.mask) + (a.stop_id is not None) for a in answers)
    return {
        "reward": sum(rewards) / len(rewards),
        "solved_frac": sum(max(group.rewards) > 0 for group in groups) / len(groups),
        "same_frac": len(same) / len(groups),
        "questions": len(groups),
        "groups": num_kept,
        "answer_tokens": sum(len(a.ids) for a in answers) / len(answers),
        "sampled_tokens": sampled,
        "unfinished_frac": sum(a.stop_id is None for a in answers) / len(answers),
    }


def _pack(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as flat arrays, for a checkpoint."""
    return {
        "sizes": np.array([len(row.ids) for row in rows], dtype=np.int64),
        "ids": np.array([i for row in rows for i in row.ids], dtype=np.int32),
        "mask": np.array([m for row in rows for m in row.mask], dtype=np.uint8),
        "advantages": np.array([row.advantage for row in rows], dtype=np.float64),
        "old": np.array([x for row in rows for x in row.old or ()], dtype=np.float32),
    }


def _unpack(packed: dict[str, Any]) -> list[Row]:
    rows, at, seen = [], 0, 0
    for size, advantage in zip(packed["sizes"].tolist(), packed["advantages"].tolist(), strict=True):
        ids, mask = (packed[name][at : at + size].tolist() for name in ("ids", "mask"))
        rows.append(Row(ids, mask, advantage, packed["old"][seen : seen + size - 1].tolist()))
        at, seen = at + size, seen + size - 1
    return rows
