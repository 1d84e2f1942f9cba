"""What mid-training and fine-tuning are trained on, preset by preset.

smoke and cpu-demo use the embedded corpus alone. single-gpu and speedrun use data sets of the hub, in the
numbers of rows that were found to work (docs/decisions.md).
"""

from __future__ import annotations

from nanochat.paths import Home
from tasks.base import Mixture, Task
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee
from tasks.synthetic import SyntheticChat, heldout_tasks

__all__ = ["heldout_tasks", "hub_mixture", "mixture", "synthetic_mixture"]

STAGES = ("mid", "sft")
PRESETS = ("smoke", "cpu-demo", "single-gpu", "speedrun")

# Of every hundred conversations. Multiple choice needs most: two steps, learned from one letter.
SYNTHETIC_PERCENT = {
    "mid": {
        "choice": 50, "facts": 13, "letters": 11, "arithmetic": 10, "identity": 5, "smalltalk": 1,
        "unknown": 2, "recall": 2, "spelling": 2, "story": 1, "mixed": 3,
    },
    "sft": {
        "choice": 36, "facts": 18, "letters": 13, "arithmetic": 13, "identity": 8, "smalltalk": 3,
        "unknown": 2, "recall": 2, "spelling": 2, "story": 1, "mixed": 2,
    },
}  # fmt: skip
NUM_CONVERSATIONS = {"smoke": {"mid": 400, "sft": 200}, "cpu-demo": {"mid": 36_000, "sft": 24_000}}


def mixture(
    stage: str,
    preset: str,
    seed: int = 42,
    *,
    num_conversations: int | None = None,
    home: Home | None = None,
) -> Mixture:
    """The training conversations of a stage ("mid" or "sft").

    `num_conversations` overrides the number of embedded conversations; `home` is where hub files are kept.
    """
    if stage not in STAGES or preset not in PRESETS:
        raise ValueError(f"stage must be one of {STAGES}, preset of {PRESETS}; found {stage!r}, {preset!r}")
    if preset in NUM_CONVERSATIONS:
        return synthetic_mixture(stage, num_conversations or NUM_CONVERSATIONS[preset][stage], seed)
    return hub_mixture(stage, seed, home)


def synthetic_mixture(stage: str, num_conversations: int, seed: int = 42) -> Mixture:
    """About `num_conversations` embedded conversations, one of each kind at least; others in each stage."""
    offset = 1000 * STAGES.index(stage)
    return Mixture(
        [
            SyntheticChat(kind, max(1, num_conversations * percent // 100), seed + offset)
            for kind, percent in SYNTHETIC_PERCENT[stage].items()
        ],
        seed,
    )


def hub_mixture(stage: str, seed: int = 42, home: Home | None = None) -> Mixture:
    """Conversations of the hub, about 850 thousand rows."""
    mmlu, gsm8k = MMLU("auxiliary_train", home), GSM8K("train", home)
    is_sft = stage == "sft"
    words = english_words(home)
    tasks: list[Task | tuple[Task, int]] = [
        SmolTalk("train", home),
        (mmlu, 3 if is_sft else 1),
        (gsm8k, 4 if is_sft else 1),
        (SyntheticChat("identity", 1000, seed), 2),
        SimpleSpelling(words, 200_000),
        SpellingBee(words, 80_000),
    ]
    return Mixture(tasks, seed)


def english_words(home: Home | None = None) -> list[str]:
    """The word list of the spelling tasks, fetched if need be."""
    from nanochat.data.hub import plain_file

    return plain_file("words/words_alpha.txt", home=home).read_text(encoding="ascii").split()
