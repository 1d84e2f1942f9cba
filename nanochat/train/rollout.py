"""On-policy batches for RL: questions in, answers from the engine, rewards, token weights out.

A round asks `questions` new questions, samples `samples` answers to each with the present weights, and serves
`updates` optimizer steps. Answers are sampled at temperature 1, because the scoring pass computes the same
distribution. A group of answers whose rewards are all equal has no gradient and is dropped. Every rank writes
the answers to its share of the questions, then all ranks exchange all answers: rows can then be divided by
length, and the checkpoint of one rank holds the whole round. Letters: B rows, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from nanochat.data.loader import IGNORED, Batch
from nanochat.engine import Completion, Engine
from nanochat.engine.detokenizer import answer_of
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.train.policy import advantages, kl_estimate, log_probs, token_weights


class Rewarded(Protocol):
    """Questions with a reward for an answer's text, such as a task."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...

    def reward(self, conversation: Any, answer: str, /) -> float: ...


@dataclass(frozen=True)
class RoundPlan:
    """The size and the loss of a round. Counts are over all ranks, except device_batch and engine_batch.

    Args:
        questions, samples: questions of a round, and answers to each.
        max_tokens: longest answer.
        device_batch: rows of one forward and backward pass on one rank.
        updates: optimizer steps per round.
        clip, kl: see policy.token_weights; 0 leaves the term out.
        by_std: divide advantages by the standard deviation of the group.
        refill: how many more times as many questions may be asked to replace dropped groups.
        engine_batch: answers that one rank writes at a time.

    Raises ValueError for a count that is too small or a negative number.
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
    """A prompt and one answer to it, with the token that ended it. mask: 1 where the policy sampled.

    old_log_probs: log p of ids[1:] under the policy that sampled them; kept only for several updates.
    """

    ids: list[int]
    mask: list[int]
    advantage: float
    old_log_probs: list[float] | None = None


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


def shuffled_index(position: int, total: int, seed: int) -> int:
    """Item `position` of an endless sequence of epochs over `total` items, each epoch in its own order."""
    epoch, place = divmod(position, total)
    return int(np.random.default_rng([seed, epoch]).permutation(total)[place])


def ask(engine: Engine, task: Rewarded, positions: Sequence[int], plan: RoundPlan) -> list[Group]:
    """One group per position. A prompt that fills the context gets no answers and belongs to no group."""
    conversations, prompts, seeds = [], [], []
    for position in positions:
        conversation = task[shuffled_index(position, len(task), plan.seed)]
        prompt = engine.tokenizer.render_for_completion(conversation)
        if len(prompt) >= engine.context:
            continue
        conversations.append(conversation)
        # The seed of an answer follows from its number among all answers of the run alone: the number of
        # ranks changes nothing.
        for sample in range(plan.samples):
            prompts.append(prompt)
            seeds.append((plan.seed << 40) + position * plan.samples + sample)
    completions = engine.complete(
        prompts, max_tokens=plan.max_tokens, temperature=1.0, seed=seeds, batch_size=plan.engine_batch
    )
    groups = []
    for i, conversation in enumerate(conversations):
        first = i * plan.samples
        answers = completions[first : first + plan.samples]
        texts = [answer_of(answer.ids, engine.tokenizer) for answer in answers]
        groups.append(Group(prompts[first], answers, rewards_of(task, conversation, texts)))
    return groups


def rewards_of(task: Rewarded, conversation: Any, texts: Sequence[str]) -> list[float]:
    """The reward of each answer to a question; graded together where the task can, as programs are."""
    grade = getattr(task, "evaluate_many", None)
    if grade is None:
        return [task.reward(conversation, text) for text in texts]
    return [float(right) for right in grade([(conversation, text) for text in texts])]


class Rollouts:
    """An endless iterator of micro-batches; `plan.accum(world_size)` of them are one optimizer step.

    `results` describe the step whose batches were made last. With a `reference` model, the distance from it
    is measured, and penalised by plan.kl.
    """

    def __init__(
        self,
        engine: Engine,
        task: Rewarded,
        plan: RoundPlan,
        rt: Runtime,
        *,
        reference: GPT | None = None,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        if not len(task):
            raise ValueError("RL needs at least one question, found none")
        self.engine = engine
        self.task = task
        self.plan = plan
        self.rt = rt
        self.reference = reference
        # The next question, the next update of this round, and the answers of this round.
        self.position = 0
        self.update = 0
        self.rows: list[Row] = []
        self.results: dict[str, float] = {}
        if cursor is not None:
            self.position = int(cursor["position"])
            self.update = int(cursor["update"])
            self.rows = _unpack(cursor["rows"])
            self.results = dict(cursor.get("facts", {}))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.update == 0:
                self._start_round()
            yield from self._step()

    def cursor(self) -> dict[str, Any]:
        """Where to go on after the step made last. Within a round, its answers and results are included."""
        is_within_round = self.update > 0
        return {
            "position": self.position,
            "update": self.update,
            "rows": _pack(self.rows if is_within_round else []),
            "facts": dict(self.results) if is_within_round else {},
        }

    def _start_round(self) -> None:
        """Ask questions until plan.questions groups have unequal rewards or the refills are used up."""
        start = time.perf_counter()
        asked: list[Group] = []
        num_groups = 0
        rows: list[Row] = []
        for _ in range(1 + self.plan.refill):
            for group in self._ask_all_ranks():
                asked.append(group)
                values = advantages(group.rewards, self.plan.by_std)
                if values is None or num_groups == self.plan.questions:
                    continue
                num_groups += 1
                for answer, value in zip(group.answers, values, strict=True):
                    rows.append(row_of(group.prompt, answer, value))
            if num_groups == self.plan.questions:
                break
        # Rows of like length share a batch, so that little of it is padding.
        self.rows = sorted(rows, key=lambda row: -len(row.ids))
        self.results = _round_results(asked, num_groups) | {"rollout_seconds": time.perf_counter() - start}

    def _ask_all_ranks(self) -> list[Group]:
        """The groups of the next plan.questions questions, answered by all ranks together."""
        rt = self.rt
        positions = range(self.position, self.position + self.plan.questions)
        self.position += self.plan.questions
        parts = rt.gather(ask(self.engine, self.task, positions[rt.rank :: rt.world_size], self.plan))
        # Take turns over the ranks, which restores the order of one rank.
        most = max(map(len, parts))
        return [part[i] for i in range(most) for part in parts if i < len(part)]

    def _step(self) -> list[Batch]:
        """This rank's micro-batches of one optimizer step, weighted with the present weights."""
        plan, rt = self.plan, self.rt
        size = plan.device_batch
        chunks = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        mine = chunks[rt.rank :: rt.world_size]
        # Plain REINFORCE needs no scoring pass: its weights are the advantages.
        needs_scores = plan.updates > 1 or self.reference is not None
        sums_3 = torch.zeros(3, dtype=torch.float64)
        batches = []
        for rows in mine:
            batch, advantage_BT = make_batch(rows, rt.device)
            batch.weights_BT = advantage_BT
            if needs_scores:
                sums_3 += self._weigh(batch, advantage_BT, rows)
            batches.append(batch)
        if plan.updates > 1 and self.update == 0:
            self._share_scores(mine)
        # Every rank computes the same number of micro-batches.
        batches += [blank_batch(rt.device) for _ in range(plan.accum(rt.world_size) - len(batches))]
        if needs_scores:
            num_tokens, num_clipped, kl = rt.sum(
                sums_3.to(rt.device) if rt.world_size > 1 else sums_3
            ).tolist()
            self.results["clip_frac"] = num_clipped / max(num_tokens, 1)
            if self.reference is not None:
                self.results["kl"] = kl / max(num_tokens, 1)
        self.update = (self.update + 1) % plan.updates
        batches[-1].resume = self.cursor
        return batches

    def _weigh(self, batch: Batch, advantage_BT: Tensor, rows: Sequence[Row]) -> Tensor:
        """Set the weights of a batch by a scoring pass; the sums of tokens, clipped tokens and KL."""
        new_BT = log_probs(cast(GPT, self.engine.model), batch.inputs_BT, batch.targets_BT)
        old_BT = self._old_log_probs(new_BT, rows)
        is_target_BT = batch.targets_BT != IGNORED
        reference_BT = None
        kl = 0.0
        if self.reference is not None:
            reference_BT = log_probs(self.reference, batch.inputs_BT, batch.targets_BT)
            kl = float(kl_estimate(new_BT, reference_BT).double().sum())
        weights_BT, is_clipped_BT = token_weights(
            advantage_BT, new_BT, old_BT, reference_BT, self.plan.clip, self.plan.kl
        )
        batch.weights_BT = weights_BT * is_target_BT
        num_clipped = float((is_clipped_BT & is_target_BT).sum())
        return torch.tensor([float(batch.num_targets), num_clipped, kl], dtype=torch.float64)

    def _old_log_probs(self, new_BT: Tensor, rows: Sequence[Row]) -> Tensor:
        """Log-probabilities under the policy that sampled the rows: at the first update, the present one.

        The first of several updates stores them in the rows for the later ones.
        """
        if rows[0].old_log_probs is None:
            if self.plan.updates > 1:
                for row, values in zip(rows, new_BT.tolist(), strict=True):
                    row.old_log_probs = values[: len(row.ids) - 1]
            return new_BT
        old_BT = torch.zeros_like(new_BT)
        for b, row in enumerate(rows):
            old_BT[b, : len(row.ids) - 1] = torch.tensor(row.old_log_probs)
        return old_BT

    def _share_scores(self, mine: Sequence[Sequence[Row]]) -> None:
        """Every rank learns the scores of every row, so that any rank can save and continue the round."""
        parts = self.rt.gather([[row.old_log_probs for row in rows] for rows in mine])
        for i, row in enumerate(self.rows):
            chunk, place = divmod(i, self.plan.device_batch)
            # Chunks were dealt out to the ranks in turn.
            turn, rank = divmod(chunk, self.rt.world_size)
            row.old_log_probs = parts[rank][turn][place]


def make_batch(rows: Sequence[Row], device: torch.device) -> tuple[Batch, Tensor]:
    """(batch without weights, advantages (B, T)) of rows, padded on the right where nothing is a target."""
    T = max(len(row.ids) for row in rows) - 1
    inputs_BT = torch.zeros((len(rows), T), dtype=torch.int64)
    targets_BT = torch.full((len(rows), T), IGNORED, dtype=torch.int64)
    for b, row in enumerate(rows):
        size = len(row.ids) - 1
        ids = torch.tensor(row.ids)
        mask = torch.tensor(row.mask)
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
        "old": np.array([x for row in rows for x in row.old_log_probs or ()], dtype=np.float32),
    }


def _unpack(packed: dict[str, Any]) -> list[Row]:
    """The inverse of _pack."""
    rows = []
    start, old_start = 0, 0
    for size, advantage in zip(packed["sizes"].tolist(), packed["advantages"].tolist(), strict=True):
        ids = packed["ids"][start : start + size].tolist()
        mask = packed["mask"][start : start + size].tolist()
        old = packed["old"][old_start : old_start + size - 1].tolist()
        rows.append(Row(ids, mask, advantage, old))
        start += size
        old_start += size - 1
    return rows
