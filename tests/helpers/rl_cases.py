"""Shared by the tests that import it: cases first written for tests/train/test_rl.py."""

from __future__ import annotations

from typing import Any

from helpers.rollout_cases import Checksums


class Short(Checksums):
    """Rewards answers with the letter e, which a random model writes now and then."""

    kind, name = "generative", "short"

    def reward(self, conversation: dict[str, Any], answer: str) -> float:
        return float("e" in answer)

    def evaluate(self, conversation: dict[str, Any], answer: str) -> bool:
        return self.reward(conversation, answer) > 0
