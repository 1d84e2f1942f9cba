"""What a run records and shows: metrics.jsonl always, a progress bar on rank 0, wandb when asked for."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.home import write_text
from nanochat.progress import Bar
from nanochat.run_dir import clock, read_metrics
from nanochat.train.loop import TrainState

SMOOTHING = 0.95  # of the loss and the time of a step, for the eye
WAIT_SHOWN = 0.01  # share of a step spent waiting for data above which it is shown


class MetricsLog:
    """An append-only metrics.jsonl. On resume at `step` later lines are cut, so that each step stands once.

    path None: nothing is written, as on all ranks but the first.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        self.rows = [row for row in read_metrics(path) if row["step"] <= step and step > 0]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, **values: Any) -> None:
        """Append one record; a number that is not finite becomes null."""
        if self.path is None:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            # A full disk must not end the training.
            print(f"warning: {self.path.name} not written: {error.strerror}", file=sys.stderr)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of this step has been recorded."""
        return any(row["step"] == step and "eval_seconds" in row for row in self.rows)

    def last_values(self) -> dict[str, Any]:
        """The newest smoothed loss and the newest value of every evaluation, for result.json."""
        values: dict[str, Any] = {}
        for row in self.rows:
            if "eval_seconds" in row:
                values |= {k: v for k, v in row.items() if k not in ("step", "eval_seconds")}
        losses = [row["loss"] for row in self.rows if row.get("loss") is not None][-20:]
        return values | ({"loss": sum(losses) / len(losses)} if losses else {})


class TrainLog:
    """A hook: one metrics record per step, and the progress of the run on the console.

    Args:
        flops_per_token, peak_flops: for the share of the peak of all devices (None: unknown) that is used.
        wandb: an open wandb run, or None.
        quiet: nothing on the console, as on all ranks but the first.
    """

    reads_weights = False

    def __init__(
        self,
        metrics: MetricsLog,
        name: str,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        wandb: Any = None,
        quiet: bool = False,
    ) -> None:
        self.metrics = metrics
        self.name = name
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.wandb = wandb
        self.quiet = quiet
        self.smooth_loss: float | None = None
        self.smooth_seconds: float | None = None
        self.bar: Bar | None = None

    def __call__(self, state: TrainState) -> None:
        per_second = state.step_tokens / max(state.step_seconds, 1e-9)
        row: dict[str, Any] = {
            "step": state.step,
            "loss": state.loss,
            "grad_norm": state.grad_norm,
            "lr_factor": state.rates.lr_factor if state.rates else None,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 4),
            "wait_seconds": round(state.wait_seconds, 6),
            "tokens_per_second": round(per_second, 1),
        }
        if self.peak_flops is not None:
            row["peak_frac"] = round(per_second * self.flops_per_token / self.peak_flops, 4)
        if state.skip_reason:
            row["skipped"] = state.skip_reason
        self.metrics.write(**row)
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in row.items() if name != "step"}, step=state.step)
        if math.isfinite(state.loss):
            self.smooth_loss = smoothed(self.smooth_loss, state.loss)
        self.smooth_seconds = smoothed(self.smooth_seconds, state.step_seconds)
        if not self.quiet:
            self._show(state, row)

    def _show(self, state: TrainState, row: dict[str, Any]) -> None:
        loss = state.loss if self.smooth_loss is None else self.smooth_loss
        speed = f"{row['tokens_per_second']:,.0f} tok/s"
        parts = [f"{state.step}/{state.num_steps}", f"loss {loss:.4f}", speed]
        if "peak_frac" in row:
            parts.append(f"{100 * row['peak_frac']:.0f}% of peak")
        wait_frac = state.wait_seconds / max(state.step_seconds, 1e-9)
        if wait_frac > WAIT_SHOWN and state.step > 1:
            parts.append(f"waits {100 * wait_frac:.0f}% for data")
        parts.append(f"left {clock((state.num_steps - state.step) * (self.smooth_seconds or 0.0))}")
        if self.bar is None:
            self.bar = Bar(self.name, state.num_steps)
        self.bar.show(state.step, "  ".join(parts))
        if state.step == state.num_steps or state.stopping:
            self.close()

    def close(self) -> None:
        """End the progress bar, leaving its last line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def smoothed(before: float | None, value: float) -> float:
    """An exponential moving average."""
    return value if before is None else SMOOTHING * before + (1 - SMOOTHING) * value


def open_wandb(mode: str, run_dir: Path, name: str, settings: dict[str, Any], is_main: bool) -> Any:
    """A wandb run for mode "online" or "offline", None for "off" and on other ranks."""
    if mode == "off" or not is_main:
        return None
    if mode not in ("online", "offline"):
        problem = f"--wandb must be off, offline or online, found {mode!r}"
        raise UserError(problem, "leave --wandb out for none")
    try:
        import wandb
    except ImportError as error:
        problem = "--wandb was asked for and the package wandb is not installed"
        raise UserError(problem, "pip install wandb") from error
    chosen: Any = mode
    return wandb.init(project="nanochat", name=name, config=settings, dir=str(run_dir), mode=chosen)
