"""Running Python that a model has written, and grading it: `Sandbox` is the only door."""

from nanochat.sandbox.sandbox import Outcome, Sandbox, Verdict

__all__ = ["Outcome", "Sandbox", "Verdict"]
