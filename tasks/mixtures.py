"""What mid-training and fine-tuning are trained on, preset by preset.

smoke and cpu-demo use the embedded corpus alone. single-gpu and speedrun use data sets of the hub, in the
numbers of rows that were found to work (docs/decisions.md).
"""

from __future__ import annotations

from nanochat.errors import UserError
from nanochat.home import Home
from tasks.base import Curriculum, Mixture, Task
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee
from tasks.synthetic import SyntheticChat, heldout_tasks

__all__ = ["heldout_tasks", "hub_mixture", "mixture", "primer", "synthetic_mixture"]

STAGES = ("mid", "sft")
EMBEDDED = ("smoke", "cpu-demo")  # presets that need no other data
PRESETS = (*EMBEDDED, "single-gpu", "speedrun")

# The embedded lessons, in order: (conversations of the cpu-demo, per cent of each kind). Looking things up
# comes before the documents (primer) and on the way to multiple choice (mid): docs/decisions.md 33.
LESSONS: dict[str, list[tuple[int, dict[str, int]]]] = {
    "primer": [
        (4000, {"reorder": 100}),
        (10000, {"reorder": 50, "lookup": 50}),
        (3000, {"copy": 70, "lookup": 30}),
    ],
    "mid": [
        (2600, {"reorder": 50, "lookup": 50}),
        (6000, {"reorder": 15, "copy": 5, "lookup": 25, "quiz": 35, "facts": 20}),
        (15000, {"reorder": 5, "far_lookup": 45, "far_quiz": 40, "choice": 10}),
        (16000, {
            "far_quiz": 10, "far_lookup": 4, "reorder": 2, "copy": 5, "choice": 17, "facts": 13,
            "letters": 16, "arithmetic": 13, "identity": 8, "smalltalk": 1, "unknown": 2,
            "recall": 2, "spelling": 2, "story": 3, "mixed": 2,
        }),
    ],
    "sft": [
        (23000, {
            "far_quiz": 6, "choice": 15, "copy": 4, "facts": 18, "letters": 18, "arithmetic": 13,
            "identity": 13, "smalltalk": 3, "unknown": 2, "recall": 2, "spelling": 2, "story": 2, "mixed": 2,
        }),
    ],
}  # fmt: skip
NUM_SMOKE = {"primer": 60, "mid": 400, "sft": 200}  # conversations of the preset smoke


def mixture(
    stage: str,
    preset: str,
    seed: int = 42,
    *,
    home: Home | None = None,
) -> Task:
    """The training conversations of a stage ("mid" or "sft"); `home` is where hub files are kept."""
    if stage not in STAGES or preset not in PRESETS:
        raise ValueError(f"stage must be one of {STAGES}, preset of {PRESETS}; found {stage!r}, {preset!r}")
    if preset in EMBEDDED:
        return synthetic_mixture(stage, seed, NUM_SMOKE[stage] if preset == "smoke" else None)
    return hub_mixture(stage, seed, home)


def primer(preset: str, seed: int = 42) -> Task:
    """Lists to look things up in, which come before the documents of the embedded corpus."""
    if preset not in EMBEDDED:
        raise UserError(
            f"a primer is one of {', '.join(EMBEDDED)}, found {preset!r}", "leave --primer out for none"
        )
    return synthetic_mixture("primer", seed, NUM_SMOKE["primer"] if preset == "smoke" else None)


def synthetic_mixture(stage: str, seed: int = 42, num_conversations: int | None = None) -> Task:
    """The embedded lessons of a stage, scaled to about `num_conversations`; one of each kind at least.

    Each stage and each lesson draws other conversations.
    """
    lessons = LESSONS[stage]
    scale = 1.0 if num_conversations is None else num_conversations / sum(n for n, _ in lessons)
    parts: list[Task] = []
    for number, (count, percents) in enumerate(lessons):
        own = seed + 1000 * (10 * list(LESSONS).index(stage) + number)
        kinds = [
            SyntheticChat(kind, max(1, round(count * scale * percent / 100)), own)
            for kind, percent in percents.items()
        ]
        parts.append(Mixture(kinds, seed))
    return Curriculum(parts) if len(parts) > 1 else parts[0]


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
    from nanochat.data.download.hub import plain_file

    return plain_file("words/words_alpha.txt", home=home).read_text(encoding="ascii").split()
