"""Which updates are let through: finite ones that are no spike; and the loss scale of fp16. Pure values."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from nanochat.errors import UserError

WINDOW = 128
SIGMAS = 6.0
MAX_SKIPS = 20  # in a row, before it is an error
MAX_SPIKES = 3  # in a row: skipping leaves the weights as they are, so a fourth is not the data's doing


@dataclass
class Gate:
    """Judges loss and gradient norm against the last 128 accepted ones (mean + 6 sigma, once full)."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skips_in_a_row: int = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """None to let the update through, else the reason to skip it. UserError after 20 skips in a row."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return self._skip(f"the {name} is {value}")
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            limit = self.limit(window)
            if limit is not None and value > limit:
                if self.skips_in_a_row < MAX_SPIKES:
                    return self._skip(f"the {name} is {value:.4g}, above its limit {limit:.4g}")
                self.losses.clear()  # not the data: the weights stand in a steeper place
                self.norms.clear()
        self.losses.append(loss)
        self.norms.append(norm)
        self.skips_in_a_row = 0
        return None

    def _skip(self, reason: str) -> str:
        self.skips_in_a_row += 1
        if self.skips_in_a_row >= MAX_SKIPS:
            raise UserError(
                f"{MAX_SKIPS} updates in a row were skipped, the last because {reason}",
                "lower the learning rate, or go back to an earlier step with --resume=N",
            )
        return reason

    @staticmethod
    def limit(window: deque[float]) -> float | None:
        """mean + 6 sigma of a full window, None before."""
        if len(window) < WINDOW:
            return None
        mean = sum(window) / WINDOW
        return mean + SIGMAS * math.sqrt(sum((x - mean) ** 2 for x in window) / WINDOW)

    def to_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "skips_in_a_row": self.skips_in_a_row}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Gate:
        return cls(deque(values["losses"], WINDOW), deque(values["norms"], WINDOW), values["skips_in_a_row"])


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halved when a gradient overflows, doubled after 1,000 good steps."""

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, grad_norm: float) -> None:
        if not math.isfinite(grad_norm):
            self.value, self.good_steps = max(self.value / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps == 1000:
            self.value, self.good_steps = min(self.value * 2, 2.0**24), 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
