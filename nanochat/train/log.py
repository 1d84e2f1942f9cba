"""What a run says: metrics.jsonl always, a live bar or plain lines on the console, wandb when asked for."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.train.loop import TrainState

PLAIN_SECONDS = 5.0  # between two plain lines
SMOOTHING = 0.95
WORTH_TELLING = 0.01  # share of a step spent waiting for data


class Metrics:
    """An append-only metrics.jsonl; a resume cuts the lines after its step, so that each step stands once."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= step and step > 0]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.rows = kept

    def write(self, **values: Any) -> None:
        """Append one record; a number that is not finite becomes null."""
        if self.path is None:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk must not end the training
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a torn last line (a killed run) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class TrainLog:
    """A hook: one metrics record a step, and the progress of the run on the console of rank 0."""

    def __init__(
        self,
        metrics: Metrics,
        name: str,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        wandb: Any = None,
        quiet: bool = False,
    ) -> None:
        self.metrics, self.name, self.wandb = metrics, name, wandb
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.smooth_loss: float | None = None
        self.smooth_seconds: float | None = None
        self.last_line = 0.0
        self.bar: Any = None
        self.quiet = quiet

    reads_weights = False

    def __call__(self, state: TrainState) -> None:
        per_second = state.step_tokens / max(state.step_seconds, 1e-9)
        used = None if self.peak_flops is None else per_second * self.flops_per_token / self.peak_flops
        lr = state.rates.lr_factor if state.rates else None
        row: dict[str, Any] = {
            "step": state.step,
            "loss": state.loss,
            "grad_norm": state.grad_norm,
            "lr_factor": lr,
        }
        row |= {
            "tokens": state.tokens,
            "seconds": round(state.seconds, 4),
            "wait_seconds": round(state.wait_seconds, 6),
            "tokens_per_second": round(per_second, 1),
        }
        if used is not None:
            row["peak_frac"] = round(used, 4)
        if state.skip_reason:
            row["skipped"] = state.skip_reason
        self.metrics.write(**row)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=state.step)
        if math.isfinite(state.loss):
            self.smooth_loss = (
                state.loss
                if self.smooth_loss is None
                else SMOOTHING * self.smooth_loss + (1 - SMOOTHING) * state.loss
            )
        if not self.quiet:
            self._show(state, per_second, used)

    def _show(self, state: TrainState, per_second: float, used: float | None) -> None:
        seconds = state.step_seconds
        self.smooth_seconds = (
            seconds
            if self.smooth_seconds is None
            else SMOOTHING * self.smooth_seconds + (1 - SMOOTHING) * seconds
        )
        share = "" if used is None else f"  {100 * used:.0f}% of peak"
        left = clock((state.num_steps - state.step) * self.smooth_seconds)
        loss = state.loss if self.smooth_loss is None else self.smooth_loss
        waited = state.wait_seconds / max(seconds, 1e-9)
        wait = f"  waits {100 * waited:.0f}% for data" if waited > WORTH_TELLING and state.step > 1 else ""
        text = f"loss {loss:.4f}  {per_second:,.0f} tok/s{share}{wait}"
        if sys.stdout.isatty():
            if self.bar is None:
                self.bar = _bar(self.name, state.num_steps)
            self.bar.update(self.bar.task_ids[0], completed=state.step, text=text, left=left)
            if state.step == state.num_steps or state.stopping:
                self.close()
        elif time.monotonic() - self.last_line > PLAIN_SECONDS or state.step in (1, state.num_steps):
            self.last_line = time.monotonic()
            print(f"{self.name} {state.step}/{state.num_steps}  {text}  left {left}", flush=True)

    def close(self) -> None:
        """End the live bar, leaving its last line."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _bar(name: str, total: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TextColumn("{task.fields[text]}"), TextColumn("left {task.fields[left]}"))
    progress.add_task(name, total=total, text="", left="")
    progress.start()
    return progress


def clock(seconds: float) -> str:
    """90 -> '1:30', 4000 -> '1:06:40'."""
    whole = int(max(seconds, 0))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def open_wandb(mode: str, run_dir: Path, name: str, settings: dict[str, Any], is_main: bool) -> Any:
    """A wandb run for mode "online" or "offline", None for "off" and on other ranks."""
    if mode == "off" or not is_main:
        return None
    if mode not in ("online", "offline"):
        raise UserError(
            f"--wandb must be off, offline or online, found {mode!r}", "leave --wandb out for none"
        )
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "--wandb was asked for and the package wandb is not installed", "pip install wandb"
        ) from error
    where: dict[str, Any] = {"project": "nanochat", "dir": str(run_dir), "mode": mode}
    return wandb.init(name=name, config=settings, **where)
