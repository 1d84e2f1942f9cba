"""Chat tasks: accuracy with its uncertainty. Categorical by the letters' logits, generative by answers.

A task has name, kind, len, [i] -> conversation (its last message is the reference) and evaluate(conversation,
answer). With several samples a question, accuracy is their share of right ones, and pass@k stands beside it.
Left out: which tasks there are (the tasks package).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.chat_format import text_of
from nanochat.engine import Engine
from nanochat.engine.detokenizer import answer_of
from nanochat.eval.passk import bootstrap, pass_at_k, powers_up_to
from nanochat.eval.rows import batch_tokens_for, last_logits
from nanochat.protocols import Model, Tokenizer
from nanochat.runtime import Runtime

Z_95 = 1.959964  # of the normal distribution, for an interval of 95 %

TOO_LONG = "prompt too long"

Facts = dict[str, Any]


def wilson(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of right / total, inside [0, 1]; (0, 1) for no examples.

    >>> tuple(round(x, 4) for x in wilson(8, 10))
    (0.4902, 0.9433)
    """
    if total == 0:
        return 0.0, 1.0
    p, spread = right / total, z * z / total
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / total + spread / total / 4) / (1 + spread)
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # p inside, also when rounded


def chat_core(facts: Mapping[str, Facts]) -> float | None:
    """The mean over tasks of (accuracy - chance) / (1 - chance); None for no tasks."""
    centred = [(f["accuracy"] - f["chance"]) / (1 - f["chance"]) for f in facts.values()]
    return sum(centred) / len(centred) if centred else None


def choose_letters(
    model: Model, tok: Tokenizer, conversations: Sequence[Any], batch_tokens: int
) -> list[str]:
    """Of each conversation's "letters" the one with the highest logit where the answer begins.

    Raises ValueError for a letter that is not one token.
    """
    ids_of: dict[str, int] = {}
    for letter in {letter for conversation in conversations for letter in conversation["letters"]}:
        ids = tok.encode(letter)
        if len(ids) != 1:
            raise ValueError(f"a letter must be one token, found {letter!r} in {len(ids)}")
        ids_of[letter] = ids[0]
    answers = [""] * len(conversations)
    rows = [tok.render_for_completion(conversation) for conversation in conversations]
    for indices, logits_BV in last_logits(model, rows, batch_tokens):
        for i, logits_V in zip(indices, logits_BV, strict=True):
            letters = conversations[i]["letters"]
            answers[i] = letters[int(logits_V[[ids_of[letter] for letter in letters]].argmax())]
    return answers


def write_answers(
    engine: Engine, conversations: Sequence[Any], seeds: Sequence[int], **how: Any
) -> list[tuple[str, str, str]]:
    """(answer, everything written, why it ended) of each; the answer is the text parts, without tool calls.

    `how`: the other arguments of Engine.complete. A prompt that fills the context gets no answer and ends
    with TOO_LONG, which is wrong.
    """
    tok = engine.tokenizer
    rows = [tok.render_for_completion(conversation) for conversation in conversations]
    fits = [i for i, ids in enumerate(rows) if len(ids) < engine.context]
    done = engine.complete([rows[i] for i in fits], seed=[seeds[i] for i in fits], **how)
    written = [("", "", TOO_LONG)] * len(rows)
    for i, one in zip(fits, done, strict=True):
        written[i] = (answer_of(one.ids, tok), tok.decode(one.ids), one.finish_reason)
    return written


def evaluate_task(
    task: Any, engine: Engine, rt: Runtime, *, max_problems: int | None = None, max_tokens: int = 512,
    batch_size: int = 256, temperature: float = 0.0, seed: int = 1, num_samples: int = 1,
) -> tuple[Facts, list[Facts]]:  # fmt: skip
    """(facts, one record per answer in the task's order, equal on every rank) of the first max_problems.

    Ranks share the examples. The chance of a categorical task is one in its usual number of letters. Where a
    generative task gets `num_samples` answers a question (which needs a temperature), the interval comes from
    resampled questions and facts hold pass_at {k: share}; else it is Wilson's.
    """
    begun = time.perf_counter()
    total = len(task) if max_problems is None else min(max_problems, len(task))
    indices = range(rt.rank, total, rt.world_size)
    conversations = [task[i] for i in indices]
    times = 1
    if task.kind == "categorical":
        letters = choose_letters(engine.model, engine.tokenizer, conversations, batch_tokens_for(rt.device))
        written = [(letter, letter, "stop") for letter in letters]
    else:
        times = num_samples
        seeds = [seed + i + total * s for i in indices for s in range(times)]
        how = {"max_tokens": max_tokens, "batch_size": batch_size, "temperature": temperature}
        written = write_answers(engine, [c for c in conversations for _ in range(times)], seeds, **how)
    asked = [(i, c) for i, c in zip(indices, conversations, strict=True) for _ in range(times)]
    grade = getattr(task, "evaluate_many", None)  # of a task that grades faster together
    verdicts = None if grade is None else grade([(c, w[0]) for (_, c), w in zip(asked, written, strict=True)])
    mine = [
        _record(task, i, conversation, *answer, None if verdicts is None else verdicts[n])
        for n, ((i, conversation), answer) in enumerate(zip(asked, written, strict=True))
    ]
    records = sorted((r for part in rt.gather(mine) for r in part), key=lambda r: r["index"])
    right = sum(record["right"] for record in records)
    low, high = wilson(right, len(records))
    pass_at = {}
    if times > 1:
        per_question = Counter(record["index"] for record in records if record["right"])
        counts = [per_question[i] for i in range(total)]
        low, high = bootstrap([count / times for count in counts])
        pass_at = {
            str(k): sum(pass_at_k(times, count, k) for count in counts) / max(total, 1)
            for k in powers_up_to(times)
        }
    facts = {
        "accuracy": right / len(records) if records else 0.0,
        "low": low,
        "high": high,
        "right": right,
        "total": len(records),
        "chance": _chance(rt.gather(Counter(len(c.get("letters", ())) for c in conversations))),
        "num_unfinished": sum(record["ended"] != "stop" for record in records),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    return facts | ({"num_samples": times, "pass_at": pass_at} if times > 1 else {}), records


def _record(
    task: Any, index: int, conversation: Any, answer: str, full: str, ended: str, verdict: bool | None = None
) -> Facts:
    *asked, reference = conversation["messages"]
    if verdict is None:
        verdict = ended != TOO_LONG and bool(task.evaluate(conversation, answer))
    return {
        "index": index,
        "question": text_of(asked[-1]["content"]),
        "reference": text_of(reference["content"]),
        "answer": answer,
        "full": full,
        "ended": ended,
        "right": verdict and ended != TOO_LONG,
    }


def _chance(counts: Sequence[Counter[int]]) -> float:
    together = sum(counts, Counter[int]())
    usual = together.most_common(1)[0][0] if together else 0
    return 1 / usual if usual else 0.0
