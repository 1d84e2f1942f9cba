"""The one training loop. Every stage minimises sum(weight * nll) / num_targets over an iterator of batches.

A step: `accum` micro-batches forward and backward, gradients reduced over ranks, the gate (finite? no
spike?), update, hooks. num_targets counts the supervised tokens of all micro-batches and ranks, so that any
split of the same rows gives the same gradient. Left out: what a batch is made of (nanochat.data), what a hook
does.
"""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import torch

from nanochat.errors import Interrupted, UserError
from nanochat.optim import gathers
from nanochat.optim.schedule import (
    linear_to_zero,
    lr_factor,
    muon_momentum,
    post_training_momentum,
    weight_decay_factor,
)
from nanochat.runtime import Runtime
from nanochat.train.guards import Gate, LossScale
from nanochat.train.watch import Watch

MAX_EMPTY_STEPS = 10  # steps in a row without a target (SFT, RL) before it is an error


@dataclass(frozen=True)
class Rates:
    """What the schedule says for one step: factors on the initial rates, and Muon's momentum."""

    lr_factor: float
    momentum: float
    decay_factor: float = 1.0


def pretraining_rates(primer: int, num_steps: int, warmup: int, warmdown: float, step: int) -> Rates:
    """`primer` steps of lessons (flat, the last 40 % down to zero, no decay), then the documents' rates."""
    if step < primer:
        return Rates(linear_to_zero(step, primer, 0.4), post_training_momentum(step, primer), 0.0)
    k, N = step - primer, num_steps
    return Rates(
        lr_factor(k, N, warmup=warmup, warmdown_frac=warmdown),
        muon_momentum(k, N, warmdown_frac=warmdown),
        weight_decay_factor(k, N),
    )


@dataclass
class TrainState:
    """Everything that changes during a run; `to_dict` is what a checkpoint keeps beside tensors."""

    step: int = 0
    num_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    empty: int = 0
    resume: Callable[[], dict[str, Any]] | None = None  # makes the data's cursor
    gate: Gate = field(default_factory=Gate)
    loss_scale: LossScale | None = None
    best: float | None = None
    metrics: Any = None  # nanochat.train.log.Metrics
    # of this step only
    loss: float = float("nan")
    grad_norm: float = float("nan")
    value: float = float("nan")  # of the newest evaluation
    rates: Rates | None = None
    step_seconds: float = 0.0
    wait_seconds: float = 0.0  # of them, for data
    step_tokens: int = 0
    skip_reason: str | None = None
    stopping: bool = False

    KEPT = ("step", "tokens", "seconds", "skipped", "empty", "best")

    @property
    def cursor(self) -> dict[str, Any] | None:
        """Where the data goes on after this step."""
        return None if self.resume is None else self.resume()

    def to_dict(self) -> dict[str, Any]:
        kept: dict[str, Any] = {name: getattr(self, name) for name in self.KEPT}
        scale = None if self.loss_scale is None else self.loss_scale.to_dict()
        return kept | {"gate": self.gate.to_dict(), "loss_scale": scale}

    def load_dict(self, values: dict[str, Any]) -> None:
        for name in self.KEPT:
            setattr(self, name, values[name])
        self.gate = Gate.from_dict(values["gate"])
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
    """Whether a hook may look at weights other than by forward passes and state_dict(); if it does not say,
    yes."""
    says = getattr(hook, "reads_weights", True)
    return says(state) if callable(says) else says


class Signals:
    """While entered, SIGTERM and SIGINT set `.received`; a second one acts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        except ValueError:  # not the main thread: signals stay as they are
            pass
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def apply_rates(optimizer: Any, rates: Rates) -> None:
    """Write one step's rates into the optimizer's groups; weight decay follows only for Muon's."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rates.lr_factor
        if group["kind"] == "muon":
            group["momentum"] = rates.momentum
            group["weight_decay"] = (
                group.setdefault("initial_weight_decay", group["weight_decay"]) * rates.decay_factor
            )


def fit(
    model: Any,
    optimizer: Any,
    batches: Iterable[Any],
    *,
    num_steps: int,
    accum: int,
    schedule: Callable[[int], Rates],
    rt: Runtime,
    hooks: list[Hook],
    state: TrainState,
    allow_empty: bool = False,
) -> TrainState:
    """Train from state.step to num_steps. Hooks run in order after every step.

    Raises UserError for a step without targets (unless allow_empty: skipped on all ranks, ten in a row an
    error) and for a run that diverges; Interrupted after SIGTERM or SIGINT, once the hooks have seen
    state.stopping.
    """
    state.num_steps = num_steps
    if rt.dtype == torch.float16 and state.loss_scale is None:
        state.loss_scale = LossScale()
    rows: Iterator[Any] = iter(batches)
    watch = Watch(rt)
    model.train()
    gc.collect()
    gc.freeze()
    gc.disable()  # its pauses cost minutes in a long run; collected by hand below
    end_gathers = _overlap_gathers(model, optimizer, rt)
    try:
        with Signals() as signals:
            while state.step < num_steps:
                with watch.step(state.step):
                    _step(model, optimizer, rows, accum, schedule(state.step), rt, state, allow_empty, watch)
                state.step += 1
                state.stopping = rt.any(signals.received is not None)
                if rt.world_size > 1 and any(reads_weights(hook, state) for hook in hooks):
                    optimizer.finish()
                for hook in hooks:
                    hook(state)
                if state.stopping and state.step < num_steps:
                    who = signals.received or "a signal on another rank"
                    raise Interrupted(f"{who} at step {state.step}; run the same command to continue")
                if state.step % 1000 == 0:
                    gc.collect()
        end_gathers()
    finally:
        gc.enable()
        gc.unfreeze()
    return state


def _overlap_gathers(model: Any, optimizer: Any, rt: Runtime) -> Callable[[], None]:
    """Begin what --speed=gather asks for; returns what ends it."""
    if rt.world_size == 1 or not getattr(model, "overlaps_gathers", False):
        return lambda: None
    reason = gathers.why_not(model)
    if reason is not None:
        rt.say(f"speed: weights are gathered before the next step, because {reason}")
        return lambda: None
    return gathers.overlap(optimizer, model)


def _step(
    model: Any,
    optimizer: Any,
    rows: Iterator[Any],
    accum: int,
    rates: Rates,
    rt: Runtime,
    state: TrainState,
    allow_empty: bool,
    watch: Watch,
) -> None:
    start = time.perf_counter()
    micro = list(islice(rows, accum))
    state.wait_seconds = time.perf_counter() - start
    if len(micro) < accum:
        raise UserError(
            f"the data ended at step {state.step} of {state.num_steps}", "ask for fewer steps or more epochs"
        )
    watch.mark(state.step, 1)
    counts = torch.tensor(
        [sum(b.num_targets for b in micro), sum(b.inputs_BT.numel() for b in micro)], dtype=torch.float64
    )
    num_targets, num_tokens = (
        int(n) for n in rt.sum(counts.to(rt.device) if rt.world_size > 1 else counts).tolist()
    )
    state.resume, state.rates, state.skip_reason = micro[-1].resume, rates, None
    if num_targets == 0:
        _skip_empty(state, allow_empty)
    else:
        state.empty = 0
        apply_rates(optimizer, rates)
        loss_scale = 1.0 if state.loss_scale is None else state.loss_scale.value
        unit = loss_scale * rt.world_size / num_targets
        loss = torch.zeros((), device=rt.device)
        for batch in micro:
            hidden = model.hidden(batch.inputs_BT, batch.doc_start_BT)
            if batch.weights_BT is None:
                weights_BT = torch.full((), unit, device=rt.device).expand(batch.targets_BT.shape)
            else:
                weights_BT = batch.weights_BT * unit
            part = model.weighted_nll(hidden, batch.targets_BT, weights_BT)
            if rt.world_size > 1 and batch is micro[-1]:
                optimizer.overlap()
            part.backward()
            loss += part.detach()
        watch.mark(state.step, 2)
        norm = optimizer.reduce(scale=1.0 / loss_scale)
        state.loss = float(rt.sum(loss)) / (loss_scale * rt.world_size)
        state.grad_norm = float(norm)
        state.skip_reason = state.gate.judge(state.loss, state.grad_norm)
        if state.loss_scale is not None:
            state.loss_scale.update(state.grad_norm)
        if state.skip_reason is None:
            optimizer.update()
        else:
            state.skipped += 1
            rt.say(f"step {state.step}: update skipped, {state.skip_reason}")
        optimizer.zero_grad(set_to_none=True)
    state.step_tokens, state.tokens = num_tokens, state.tokens + num_tokens
    state.step_seconds = time.perf_counter() - start
    state.seconds += state.step_seconds


def _skip_empty(state: TrainState, allow_empty: bool) -> None:
    state.empty += 1
    state.loss = state.grad_norm = float("nan")
    state.skip_reason = "no supervised token"
    state.skipped += 1
    if not allow_empty or state.empty >= MAX_EMPTY_STEPS:
        times = f"{state.empty} steps in a row" if allow_empty else f"step {state.step}"
        raise UserError(
            f"{times} held no token to learn from",
            "check the data: documents may be empty, conversations may lack assistant turns",
        )
