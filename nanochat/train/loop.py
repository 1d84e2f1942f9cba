"""The one training loop. Every stage minimises sum(weight * nll) / num_targets over an iterator of batches.

num_targets counts the supervised tokens of all micro-batches and ranks of a step, so that any split of the
same rows gives the same gradient. What a batch is made of: nanochat.data and train.rollout. What happens
after a step (log, save, evaluate): hooks.
"""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import Interrupted, UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, gathers
from nanochat.optim.schedule import (
    linear_to_zero,
    lr_factor,
    muon_momentum,
    post_training_momentum,
    weight_decay_factor,
)
from nanochat.runtime import Runtime
from nanochat.train.guards import LossScale, RankMonitor, SpikeGuard

MAX_EMPTY_STEPS = 10  # steps in a row without a target (SFT, RL) before it is an error
COLLECT_STEPS = 1000  # between two garbage collections


@dataclass(frozen=True)
class Rates:
    """What the schedule says for one step: factors on the initial rates, and Muon's momentum."""

    lr_factor: float
    momentum: float
    decay_factor: float = 1.0


def pretraining_rates(
    num_curriculum_steps: int, num_steps: int, warmup: int, warmdown: float, step: int
) -> Rates:
    """The rates of pretraining: those of the warm-up curriculum, then those of the documents.

    The curriculum's rate is constant and falls to zero over its last 40 %, without weight decay.
    """
    if step < num_curriculum_steps:
        momentum = post_training_momentum(step, num_curriculum_steps)
        return Rates(linear_to_zero(step, num_curriculum_steps, 0.4), momentum, 0.0)
    step -= num_curriculum_steps
    return Rates(
        lr_factor(step, num_steps, warmup=warmup, warmdown_frac=warmdown),
        muon_momentum(step, num_steps, warmdown_frac=warmdown),
        weight_decay_factor(step, num_steps),
    )


@dataclass
class TrainState:
    """Everything that changes during a run; `to_dict` is what a checkpoint keeps besides tensors."""

    step: int = 0
    num_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    empty: int = 0
    resume: Callable[[], dict[str, Any]] | None = None  # makes the data's cursor
    spike_guard: SpikeGuard = field(default_factory=SpikeGuard)
    loss_scale: LossScale | None = None
    best: float | None = None
    metrics: Any = None  # nanochat.train.log.MetricsLog

    # Of the last step only.
    loss: float = float("nan")
    grad_norm: float = float("nan")
    value: float = float("nan")  # of the newest evaluation
    rates: Rates | None = None
    step_seconds: float = 0.0
    wait_seconds: float = 0.0  # of these, waiting for data
    step_tokens: int = 0
    skip_reason: str | None = None
    stopping: bool = False

    SAVED = ("step", "tokens", "seconds", "skipped", "empty", "best")

    @property
    def cursor(self) -> dict[str, Any] | None:
        """Where the data goes on after this step."""
        return None if self.resume is None else self.resume()

    def to_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {name: getattr(self, name) for name in self.SAVED}
        scale = None if self.loss_scale is None else self.loss_scale.to_dict()
        return saved | {"gate": self.spike_guard.to_dict(), "loss_scale": scale}

    def load_dict(self, values: dict[str, Any]) -> None:
        for name in self.SAVED:
            setattr(self, name, values[name])
        self.spike_guard = SpikeGuard.from_dict(values["gate"])
        self.loss_scale = None if values["loss_scale"] is None else LossScale(**values["loss_scale"])


Hook = Callable[[TrainState], None]


def every(n: int, do: Hook) -> Hook:
    """A hook that runs after every n-th step and after the last one; never for n = 0."""

    def is_due(state: TrainState) -> bool:
        return n > 0 and (state.step % n == 0 or state.step == state.num_steps)

    def hook(state: TrainState) -> None:
        if is_due(state):
            do(state)

    hook.reads_weights = is_due  # type: ignore[attr-defined]
    return hook


def reads_weights(hook: Hook, state: TrainState) -> bool:
    """True if the hook needs up-to-date weights after this step. Defaults to True.

    A forward pass and state_dict() wait for the weights themselves; hooks that use only these may say False.
    """
    says = getattr(hook, "reads_weights", True)
    return says(state) if callable(says) else says


class Signals:
    """While entered, SIGTERM and SIGINT set `.received`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers_before[number] = signal.signal(number, self._catch)
        except ValueError:  # not the main thread: signals stay as they are
            pass
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Python's collector stops every rank now and then; in a long run its pauses cost minutes."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def overlapped_gathers(model: GPT, optimizer: MuonAdamW, rt: Runtime, is_wanted: bool) -> Iterator[None]:
    """While entered, new weights travel under the next forward pass, if that is wanted and possible."""
    if rt.world_size == 1 or not is_wanted:
        yield
        return
    reason = gathers.unsupported_reason(model)
    if reason is not None:
        rt.say(f"speed: weights are gathered before the next step, because {reason}")
        yield
        return
    end = gathers.overlap(optimizer, model)
    yield
    end()


def fit(
    model: GPT,
    optimizer: MuonAdamW,
    batches: Iterable[Any],
    *,
    num_steps: int,
    accum: int,
    schedule: Callable[[int], Rates],
    rt: Runtime,
    hooks: list[Hook],
    state: TrainState,
    allow_empty: bool = False,
    overlap_gathers: bool = False,
) -> TrainState:
    """Train from state.step to num_steps. Hooks run in order after every step.

    Args:
        accum: micro-batches per step on each rank.
        allow_empty: skip a step without targets on all ranks; ten in a row are an error.
        overlap_gathers: let new weights travel under the next forward pass (several ranks).

    Raises UserError for a step without targets (unless allow_empty), for data that ends too early and for a
    run that diverges; Interrupted after SIGTERM or SIGINT, once the hooks have seen state.stopping.
    """
    state.num_steps = num_steps
    if rt.dtype == torch.float16 and state.loss_scale is None:
        state.loss_scale = LossScale()
    micro_batches = iter(batches)
    monitor = RankMonitor(rt)
    model.train()
    with (
        manual_garbage_collection(),
        overlapped_gathers(model, optimizer, rt, overlap_gathers),
        Signals() as signals,
    ):
        while state.step < num_steps:
            with monitor.step(state.step):
                start = time.perf_counter()
                micro = take(micro_batches, accum, state)
                state.wait_seconds = time.perf_counter() - start
                train_step(model, optimizer, micro, schedule(state.step), rt, state, allow_empty, monitor)
                state.step_seconds = time.perf_counter() - start
                state.seconds += state.step_seconds
            state.step += 1
            # A signal on one rank stops all of them after the same step.
            state.stopping = rt.any(signals.received is not None)
            if rt.world_size > 1 and any(reads_weights(hook, state) for hook in hooks):
                optimizer.finish()
            for hook in hooks:
                hook(state)
            if state.stopping and state.step < num_steps:
                who = signals.received or "a signal on another rank"
                raise Interrupted(f"{who} at step {state.step}; run the same command to continue")
            if state.step % COLLECT_STEPS == 0:
                gc.collect()
    return state


def take(micro_batches: Iterator[Any], accum: int, state: TrainState) -> list[Any]:
    """The micro-batches of one step. Raises UserError if the data has ended."""
    micro = list(islice(micro_batches, accum))
    if len(micro) < accum:
        problem = f"the data ended at step {state.step} of {state.num_steps}"
        raise UserError(problem, "ask for fewer steps or more epochs")
    state.resume = micro[-1].resume
    return micro


def train_step(
    model: GPT,
    optimizer: MuonAdamW,
    micro: list[Any],
    rates: Rates,
    rt: Runtime,
    state: TrainState,
    allow_empty: bool,
    monitor: RankMonitor,
) -> None:
    """One optimizer step: gradients of all micro-batches, the sum over ranks, the guard, the update."""
    monitor.mark(state.step, "computing")
    num_targets, state.step_tokens = count_tokens(micro, rt)
    state.tokens += state.step_tokens
    state.rates = rates
    if num_targets == 0:
        skip_empty_step(state, allow_empty)
        return
    state.empty = 0
    apply_rates(optimizer, rates)

    # fp16 gradients are scaled up, or small ones would become 0; `reduce` scales them back.
    loss_scale = 1.0 if state.loss_scale is None else state.loss_scale.value
    # `reduce` averages over ranks, and each token must count once, however the batch is divided.
    token_weight = loss_scale * rt.world_size / num_targets
    loss = accumulate_gradients(model, optimizer, micro, token_weight, rt)

    monitor.mark(state.step, "exchanging gradients")
    norm = optimizer.reduce(scale=1.0 / loss_scale)
    state.loss = float(rt.sum(loss)) / (loss_scale * rt.world_size)
    state.grad_norm = float(norm)
    state.skip_reason = state.spike_guard.reason_to_skip(state.loss, state.grad_norm)
    if state.loss_scale is not None:
        state.loss_scale.update(state.grad_norm)
    if state.skip_reason is None:
        optimizer.update()
    else:
        state.skipped += 1
        rt.say(f"step {state.step}: update skipped, {state.skip_reason}")
    optimizer.zero_grad(set_to_none=True)


def count_tokens(micro: list[Any], rt: Runtime) -> tuple[int, int]:
    """(targets, tokens) of a step's micro-batches on all ranks."""
    counts = torch.tensor(
        [sum(batch.num_targets for batch in micro), sum(batch.inputs_BT.numel() for batch in micro)],
        dtype=torch.float64,
    )
    if rt.world_size > 1:
        counts = counts.to(rt.device)
    num_targets, num_tokens = rt.sum(counts).tolist()
    return int(num_targets), int(num_tokens)


def accumulate_gradients(
    model: GPT, optimizer: MuonAdamW, micro: list[Any], token_weight: float, rt: Runtime
) -> Tensor:
    """Forward and backward of each micro-batch; the sum of the weighted losses of this rank."""
    loss = torch.zeros((), device=rt.device)
    for batch in micro:
        hidden_BTD = model.hidden(batch.inputs_BT, batch.doc_start_BT)
        if batch.weights_BT is None:
            weights_BT = torch.full((), token_weight, device=rt.device).expand(batch.targets_BT.shape)
        else:
            weights_BT = batch.weights_BT * token_weight
        micro_loss = model.weighted_nll(hidden_BTD, batch.targets_BT, weights_BT)
        # The gradients of the last micro-batch are final: they travel while the backward pass goes on.
        if rt.world_size > 1 and batch is micro[-1]:
            optimizer.overlap()
        micro_loss.backward()
        loss += micro_loss.detach()
    return loss


def apply_rates(optimizer: MuonAdamW, rates: Rates) -> None:
    """Write one step's rates into the optimizer's groups; only Muon's weight decay follows the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rates.lr_factor
        if group["kind"] == "muon":
            group["momentum"] = rates.momentum
            initial_decay = group.setdefault("initial_weight_decay", group["weight_decay"])
            group["weight_decay"] = initial_decay * rates.decay_factor


def skip_empty_step(state: TrainState, allow_empty: bool) -> None:
    """Count a step that has no supervised token. Raises UserError where that must not be, or not so often."""
    state.empty += 1
    state.skipped += 1
    state.loss = state.grad_norm = float("nan")
    state.skip_reason = "no supervised token"
    if not allow_empty or state.empty >= MAX_EMPTY_STEPS:
        where = f"{state.empty} steps in a row" if allow_empty else f"step {state.step}"
        raise UserError(
            f"{where} held no token to learn from",
            "check the data: documents may be empty, conversations may lack assistant turns",
        )
