"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): a better and a worse answer.

loss = -log sigmoid(margin), margin = beta * ((c - c0) - (r - r0)), c and r the log-probabilities of the
chosen and the rejected answer, c0 and r0 those of the parent. Its gradient is that of sum(weight * nll) with
the weight beta * sigmoid(-margin) on the chosen answer's tokens and its negative on the rejected one's, so
the common loop does it. Letters: B rows, T time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.config import StageSettings
from nanochat.data.loader import Batch
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim.schedule import linear_to_zero, post_training_momentum
from nanochat.protocols import Tokenizer
from nanochat.runtime import Runtime
from nanochat.train.finetune import MID_RATES, Parent, split
from nanochat.train.loop import Rates, TrainState
from nanochat.train.policy import log_probs
from nanochat.train.rollout import Row, blank_batch, make_batch, shuffled_index
from nanochat.train.stages import Training, run_stage


@dataclass(frozen=True)
class Pair:
    """The same prompt with two endings; mask 1 where the assistant's last answer stands."""

    chosen: Row
    rejected: Row


def encode_pair(record: dict[str, Any], tok: Tokenizer, max_tokens: int) -> Pair | None:
    """A record {"messages", "chosen", "rejected"} as tokens; None if one is longer than max_tokens."""
    prompt = tok.render_for_completion({"messages": record["messages"]})
    rows = []
    for name in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": record[name]}
        ids, mask = tok.render_conversation({"messages": [*record["messages"], answer]}, None)
        if len(ids) > max_tokens:
            return None
        rows.append(Row(ids, [0] * len(prompt) + mask[len(prompt) :], 0.0))
    return Pair(*rows)


def pair_weights(
    new_B: torch.Tensor, reference_B: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights (B,), margins (B/2,)) of rows chosen, rejected, chosen, ... from their log-probabilities."""
    gain_P2 = (new_B - reference_B).view(-1, 2)
    margin_P = beta * (gain_P2[:, 0] - gain_P2[:, 1])
    push_P = beta * torch.sigmoid(-margin_P)
    return torch.stack((push_P, -push_P), dim=1).flatten(), margin_P


class PairBatches:
    """An endless iterator of micro-batches over `pairs`; a step takes `per_step` of them, over all ranks.

    `accum` micro-batches are one step. `results` describe the step whose batches were made last.
    device_batch: rows, two per pair, of one forward and backward pass.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        model: GPT,
        reference: GPT,
        rt: Runtime,
        *,
        per_step: int,
        device_batch: int,
        beta: float,
        seed: int,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        self.pairs = pairs
        self.model = model
        self.reference = reference
        self.rt = rt
        self.per_step = per_step
        self.pairs_per_batch = max(1, device_batch // 2)
        self.beta = beta
        self.seed = seed
        self.position = 0 if cursor is None else int(cursor["position"])
        self.accum = math.ceil(math.ceil(per_step / self.pairs_per_batch) / rt.world_size)
        self.results: dict[str, float] = {}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._step()

    def _step(self) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""
        rt, size = self.rt, self.pairs_per_batch
        positions = range(self.position, self.position + self.per_step)
        self.position += self.per_step
        chosen = [self.pairs[shuffled_index(position, len(self.pairs), self.seed)] for position in positions]
        chunks = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        sums = torch.zeros(4, dtype=torch.float64)
        batches = []
        for chunk in chunks[rt.rank :: rt.world_size]:
            batch, chunk_sums = self.weigh(chunk)
            sums += chunk_sums
            batches.append(batch)
        # Every rank computes the same number of micro-batches.
        batches += [blank_batch(rt.device) for _ in range(self.accum - len(batches))]
        self.results = mean_results(sums, rt)
        cursor = {"position": self.position}
        batches[-1].resume = lambda: cursor
        return batches

    def weigh(self, pairs: Sequence[Pair]) -> tuple[Batch, torch.Tensor]:
        """(a batch that counts its pairs as targets, sums of loss, right order, margin, pairs)."""
        rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
        batch, _ = make_batch(rows, self.rt.device)
        new_B, reference_B = (
            log_probs(model, batch.inputs_BT, batch.targets_BT).sum(1)
            for model in (self.model, self.reference)
        )
        weights_B, margin_P = pair_weights(new_B, reference_B, self.beta)
        batch.weights_BT = weights_B.unsqueeze(1).expand(batch.targets_BT.shape).contiguous()
        batch.num_targets = len(pairs)
        losses_P = -torch.nn.functional.logsigmoid(margin_P)
        found_P4 = torch.stack((losses_P, margin_P > 0, margin_P, torch.ones_like(margin_P)), dim=1)
        return batch, found_P4.double().sum(0).cpu()


def mean_results(sums_4: torch.Tensor, rt: Runtime) -> dict[str, float]:
    """Means over all ranks from the sums of loss, right order, margin and pairs."""
    if rt.world_size > 1:
        sums_4 = sums_4.to(rt.device)
    loss, right, margin, count = rt.sum(sums_4).tolist()
    count = max(count, 1)
    results = {"dpo_loss": loss / count, "preferred_frac": right / count, "margin": margin / count}
    return {name: round(value, 6) for name, value in results.items()}


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True)
class Preference:
    """How the stage "dpo" trains.

    Args:
        pairs_per_step: over all devices.
        device_batch: rows, two per pair, of one forward and backward pass.
        beta: how strongly the parent is held on to.
    """

    epochs: float
    pairs_per_step: int
    device_batch: int
    beta: float
    lr_scale: float
    seed: int


def prefer(
    plan: Preference, settings: StageSettings, rt: Runtime, parent: Parent, records: Sequence[dict[str, Any]]
) -> None:
    """Train the stage "dpo" on preference records. settings: see stages.run_stage."""

    def prepare() -> Training:
        return prepare_preference(plan, rt, parent, records)

    run_stage("dpo", settings, rt, parent.inputs, prepare, result_shown="val_preferred_frac")


def prepare_preference(
    plan: Preference, rt: Runtime, parent: Parent, records: Sequence[dict[str, Any]]
) -> Training:
    """Model, reference, batches of pairs and evaluation of the stage."""
    train, held_out, num_dropped = encode_pairs(records, parent)
    model = parent.build_model(rt)
    reference = parent.build_model(rt)

    def pair_batches(pairs: Sequence[Pair], cursor: dict[str, Any] | None) -> PairBatches:
        return PairBatches(
            pairs,
            model,
            reference,
            rt,
            per_step=plan.pairs_per_step,
            device_batch=plan.device_batch,
            beta=plan.beta,
            seed=plan.seed,
            cursor=cursor,
        )

    # The batches of the run, made by `batches` and read by the hook.
    current: list[PairBatches] = []

    def batches(cursor: dict[str, Any] | None) -> PairBatches:
        current[:] = [pair_batches(train, cursor)]
        return current[0]

    def record(state: TrainState) -> None:
        state.metrics.write(step=state.step, **current[0].results)

    def evaluate() -> tuple[float, dict[str, float]]:
        scorer = pair_batches(held_out, None)
        sums = torch.zeros(4, dtype=torch.float64)
        for i in range(rt.rank, len(held_out), rt.world_size):
            _, pair_sums = scorer.weigh(held_out[i : i + 1])
            sums += pair_sums
        results = mean_results(sums, rt)
        return results["dpo_loss"], {f"val_{name}": value for name, value in results.items()}

    num_steps = max(1, round(len(train) * plan.epochs / plan.pairs_per_step))
    rt.say(
        f"dpo: {len(train):,} pairs, {num_dropped} too long, {num_steps} steps of {plan.pairs_per_step} pairs"
    )
    return Training(
        model=model,
        tok=parent.tok,
        optimizer=parent.build_optimizer(model, plan.lr_scale, smear_scale=plan.lr_scale, **MID_RATES),
        batches=batches,
        num_steps=num_steps,
        accum=pair_batches(train, None).accum,
        schedule=lambda step: Rates(linear_to_zero(step, num_steps), post_training_momentum(step, num_steps)),
        evaluate=evaluate,
        recipe=parent.recipe,
        results={"parent": parent.name, "pairs": len(train), "pairs_dropped": num_dropped},
        first_hooks=[record],
    )


def encode_pairs(records: Sequence[dict[str, Any]], parent: Parent) -> tuple[list[Pair], list[Pair], int]:
    """(pairs to train on, pairs held out, number of pairs that are too long for the model).

    Raises UserError if too few are left.
    """
    longest = parent.config.sequence_len
    parts = []
    for part in split(records):
        encoded = [encode_pair(record, parent.tok, longest) for record in part]
        parts.append([pair for pair in encoded if pair is not None])
    train, held_out = parts
    num_dropped = len(records) - len(train) - len(held_out)
    if not train or not held_out:
        raise UserError(
            f"{num_dropped} of {len(records)} pairs are longer than {longest} tokens, and too few are left",
            "give shorter ones",
        )
    return train, held_out, num_dropped
