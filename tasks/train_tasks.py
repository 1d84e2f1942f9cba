"""Training conversations chosen by name: --tasks=4xgsm8k,arc_easy,identity:500,hf:OWNER/NAME,mine.jsonl

What stands between the commas is one of NAMED; KIND[:SIZE], a kind of the embedded corpus; hf:OWNER/NAME
[:CONFIG[:SPLIT]], a data set with a column of messages (tasks/hubchat.py); or a file that ends in .jsonl
(tasks/custom.py). 4x before it takes its conversations four times.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nanochat.corpus import KINDS
from nanochat.errors import UserError
from nanochat.home import Home
from tasks.arc import ARC
from tasks.base import Mixture, Task
from tasks.custom import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.hubchat import HubChat
from tasks.mbpp import MBPP
from tasks.mixtures import english_words
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee
from tasks.synthetic import SyntheticChat

NAMED: dict[str, Callable[[Home], Task]] = {
    "smoltalk": lambda home: SmolTalk("train", home),
    "mmlu": lambda home: MMLU("auxiliary_train", home),
    "gsm8k": lambda home: GSM8K("train", home),
    "arc_easy": lambda home: ARC("ARC-Easy", "train", home),
    "arc_challenge": lambda home: ARC("ARC-Challenge", "train", home),
    "mbpp": lambda home: MBPP("train", home),
    "simple_spelling": lambda home: SimpleSpelling(english_words(home), 200_000),
    "spelling_bee": lambda home: SpellingBee(english_words(home), 80_000),
}
USUAL_SIZE = 1000  # of a kind of the embedded corpus


def split_spec(spec: str) -> list[tuple[str, int]]:
    """(name, times) of each part of a list.

    >>> split_spec("4xgsm8k, arc_easy")
    [('gsm8k', 4), ('arc_easy', 1)]
    """
    made = []
    for part in filter(None, map(str.strip, spec.split(","))):
        match = re.fullmatch(r"(\d+)x(.+)", part)
        made.append((match[2], int(match[1])) if match else (part, 1))
    return made


def open_chosen(spec: str, home: Home, seed: int = 42) -> Mixture:
    """All conversations of the named tasks in a random order. UserError for an unknown name or none."""
    parts = split_spec(spec)
    if not parts or any(times < 1 for _, times in parts):
        raise UserError(
            f"--tasks must name what is to be learned, found {spec!r}", "for example 4xgsm8k,arc_easy"
        )
    return Mixture([(_open(name, home, seed), times) for name, times in parts], seed)


def _open(name: str, home: Home, seed: int) -> Task:
    if name.startswith("hf:"):
        return HubChat(name, home)
    if name.endswith(".jsonl"):
        return CustomJSON(name)
    kind, _, size = name.partition(":")
    if kind in KINDS and (not size or (size.isdigit() and int(size) > 0)):
        return SyntheticChat(kind, int(size or USUAL_SIZE), seed)
    if name not in NAMED:
        known = f"{', '.join(NAMED)}; KIND[:SIZE] of {', '.join(KINDS)}"
        raise UserError(f"there is no task {name!r} to learn from", f"{known}; hf:OWNER/NAME; FILE.jsonl")
    return NAMED[name](home)
