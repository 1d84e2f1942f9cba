"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): a better and a worse answer.

loss = -log sigmoid(margin), margin = beta * ((c - c0) - (r - r0)), c and r the log-probabilities of the
chosen and the rejected answer, c0 and r0 those of the parent. Its gradient is that of sum(weight * nll) with
the weight beta * sigmoid(-margin) on the chosen answer's tokens and its negative on the rejected one's, so
the common loop does it. Letters: B rows, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.data.loader import Batch
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.load import build
from nanochat.optim.schedule import linear_to_zero, post_training_momentum
from nanochat.run_dir import open_stage
from nanochat.runtime import Runtime
from nanochat.train.checkpointing import load_model_arrays
from nanochat.train.finetune import next_optimizer, parent_arrays, split, start_from
from nanochat.train.hooks import samples
from nanochat.train.loop import Rates, TrainState
from nanochat.train.policy import log_probs
from nanochat.train.rollout import Row, blank_batch, make_batch
from nanochat.train.stages import run_stage

PARENTS = ("sft", "mid")
RATES = {"wte_lr": 0.2, "lm_head_lr": 0.004, "matrix_lr": 0.02}  # mid-training's


@dataclass(frozen=True)
class Pair:
    """The same prompt with two endings; mask 1 where the assistant's last answer stands."""

    chosen: Row
    rejected: Row


def encode_pair(record: dict[str, Any], tok: Any, max_tokens: int) -> Pair | None:
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
    """An endless iterator of micro-batches over `pairs`; a step takes `per_step` of them, over all ranks."""

    def __init__(
        self, pairs: Sequence[Pair], model: Any, reference: Any, rt: Runtime, *, per_step: int,
        device_batch: int, beta: float, seed: int, cursor: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.pairs, self.model, self.reference, self.rt = pairs, model, reference, rt
        self.per_step, self.pairs_each, self.beta, self.seed = per_step, max(1, device_batch // 2), beta, seed
        self.position = 0 if cursor is None else int(cursor["position"])
        self.accum = math.ceil(math.ceil(per_step / self.pairs_each) / rt.world_size)
        self.facts: dict[str, float] = {}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._step()

    def _step(self) -> list[Batch]:
        order, rt = range(self.position, self.position + self.per_step), self.rt
        self.position += self.per_step
        chosen = [self.pairs[self._index(p)] for p in order]
        chunks = [chosen[i : i + self.pairs_each] for i in range(0, len(chosen), self.pairs_each)]
        sums = torch.zeros(4, dtype=torch.float64)
        batches = []
        for chunk in chunks[rt.rank :: rt.world_size]:
            batch, found = self.weigh(chunk)
            sums += found
            batches.append(batch)
        batches += [blank_batch(rt.device) for _ in range(self.accum - len(batches))]
        self.facts = _facts(rt.sum(sums.to(rt.device) if rt.world_size > 1 else sums))
        cursor = {"position": self.position}
        batches[-1].resume = lambda: cursor
        return batches

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pairs))
        return int(np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))[place])

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


def _facts(sums: torch.Tensor) -> dict[str, float]:
    loss, right, margin, count = sums.tolist()
    count = max(count, 1)
    return {"dpo_loss": loss / count, "preferred_frac": right / count, "margin": margin / count}


def prefer(cfg: Any, rt: Runtime, records: Sequence[dict[str, Any]]) -> None:
    """Train the stage "dpo" on preference records from the newest SFT (or mid) checkpoint."""
    tok, parent, inputs = start_from(cfg, PARENTS)
    with open_stage("dpo", cfg, rt, inputs) as stage:
        if stage.finished:
            rt.say(f"dpo: already finished, preferred {stage.finished.get('val_preferred_frac')}")
            return
        base, shape = parent.meta["recipe"], GPTConfig(**parent.meta["model"])
        train, held = split(records)
        encoded = [
            [p for r in part if (p := encode_pair(r, tok, shape.sequence_len))] for part in (train, held)
        ]
        dropped = len(records) - sum(map(len, encoded))
        if not all(encoded):
            raise UserError(
                f"{dropped} of {len(records)} pairs are longer than {shape.sequence_len} tokens, and too few "
                "are left",
                "give shorter ones",
            )
        model, reference = build(shape, rt), build(shape, rt)
        for each in (model, reference):
            load_model_arrays(each, parent_arrays(parent))
        optimizer = next_optimizer(model, base, cfg.lr_scale, smear_scale=cfg.lr_scale, **RATES)
        how: dict[str, Any] = {"per_step": cfg.pairs, "device_batch": cfg.device_batch, "beta": cfg.beta}
        current: list[PairBatches] = []

        def batches(cursor: dict[str, Any] | None) -> PairBatches:
            current[:] = [PairBatches(encoded[0], model, reference, rt, seed=cfg.seed, cursor=cursor, **how)]
            return current[0]

        def record(state: TrainState) -> None:
            state.metrics.write(step=state.step, **{k: round(v, 6) for k, v in current[0].facts.items()})

        def evaluate(state: TrainState) -> None:
            start, looker = time.perf_counter(), PairBatches(encoded[1], model, reference, rt, seed=0, **how)
            sums = torch.zeros(4, dtype=torch.float64)
            for i in range(rt.rank, len(encoded[1]), rt.world_size):
                sums += looker.weigh(encoded[1][i : i + 1])[1]
            found = _facts(rt.sum(sums.to(rt.device) if rt.world_size > 1 else sums))
            state.value = found["dpo_loss"]
            state.best = state.value if state.best is None else min(state.best, state.value)
            values = {f"val_{k}": round(v, 6) for k, v in found.items()}
            state.metrics.write(step=state.step, eval_seconds=round(time.perf_counter() - start, 3), **values)
            rt.say(f"step {state.step}: {values}")

        first = batches(None)
        num_steps = max(1, round(len(encoded[0]) * cfg.epochs / cfg.pairs))
        rt.say(f"dpo: {len(encoded[0]):,} pairs, {dropped} too long, {num_steps} steps of {cfg.pairs} pairs")
        run_stage(
            stage, cfg, model, optimizer, batches, num_steps=num_steps, accum=first.accum,
            schedule=lambda s: Rates(linear_to_zero(s, num_steps), post_training_momentum(s, num_steps)),
            evaluate=evaluate, sample=samples(model, tok, (), rt), flops_per_token=model.estimate_flops(),
            recipe=base, first=[record],
            result={"parent": inputs["parent"], "pairs": len(encoded[0]), "pairs_dropped": dropped},
        )  # fmt: skip
