"""Our model as EleutherAI's lm-evaluation-harness wants one: log-likelihoods and greedy texts, no server.

`make_lm` needs the package lm-eval (0.4.x), which is imported there. Left out: chat templates.
Letters: N scored tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from nanochat.engine import Engine
from nanochat.engine.detokenizer import StopFilter
from nanochat.eval.rows import batch_tokens_for, score_endings
from nanochat.protocols import Model, Tokenizer

MAX_NEW = 256


def encode_pair(tok: Tokenizer, context: str, ending: str) -> tuple[list[int], int]:
    """(ids with BOS first, where the ending starts). Spaces at the context's end belong to the ending.

    The ending's tokens are those of the whole text after as many tokens as the context alone has.
    """
    stripped = context.rstrip()
    ending = context[len(stripped) :] + ending
    bos = tok.get_bos_token_id()
    whole = tok.encode(stripped + ending, prepend=bos)
    start = len(tok.encode(stripped, prepend=bos)) if stripped else 1
    return whole, min(start, len(whole) - 1)


def loglikelihoods(
    model: Model, tok: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """(sum of log p in nats, whether greedy decoding would say it) of each (context, ending)."""
    rows = [encode_pair(tok, *pair) for pair in pairs]
    if any(len(ids) < 2 for ids, _ in rows):
        raise ValueError("an ending must hold at least one token")
    limit = model.config.sequence_len
    cut = [(ids[-limit:], start - max(0, len(ids) - limit)) for ids, start in rows]
    cut = [(ids, max(1, start)) for ids, start in cut]
    scores = score_endings(model, cut, batch_tokens_for(model.get_device()))
    return [
        (-nll * (len(ids) - start), greedy)
        for (ids, start), (nll, greedy) in zip(cut, scores, strict=True)
    ]  # fmt: skip


def rolling(model: Model, tok: Tokenizer, texts: Sequence[str]) -> list[float]:
    """log p of whole texts, each token predicted once, in windows of the model's length side by side."""
    limit, rows, owners = model.config.sequence_len, [], []
    for i, text in enumerate(texts):
        ids = tok.encode(text, prepend=tok.get_bos_token_id())
        for begin in range(0, max(len(ids) - 1, 0), limit):
            rows.append((ids[begin : begin + limit + 1], 1))
            owners.append(i)
    sums = [0.0] * len(texts)
    scores = score_endings(model, rows, batch_tokens_for(model.get_device()))
    for owner, (ids, _), (nll, _) in zip(owners, rows, scores, strict=True):
        sums[owner] -= nll * (len(ids) - 1)
    return sums


def continuations(
    engine: Engine, prompts: Sequence[str], stops: Sequence[Sequence[str]], max_tokens: Sequence[int]
) -> list[str]:
    """Greedy continuations, each ended by the first of its stop strings (which is left out)."""
    tok, room = engine.tokenizer, engine.context
    texts = [""] * len(prompts)
    for size in sorted(set(max_tokens)):
        chosen = [i for i, n in enumerate(max_tokens) if n == size]
        ids = [tok.encode(prompts[i], prepend=tok.get_bos_token_id())[-max(1, room - size) :] for i in chosen]
        for i, done in zip(chosen, engine.complete(ids, max_tokens=size), strict=True):
            cutter = StopFilter(list(stops[i]))
            text = cutter.push(tok.decode(done.ids))
            texts[i] = text + ("" if cutter.is_hit else cutter.flush())
    return texts


def make_lm(model: Model, tok: Tokenizer) -> Any:
    """The model as an lm_eval LM. Raises ImportError without the package."""
    LM: Any = importlib.import_module("lm_eval.api.model").LM
    engine = Engine(model, tok)

    class Nanochat(LM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return loglikelihoods(model, tok, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return rolling(model, tok, [request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            prompts, options = zip(*(request.args for request in requests))
            until = [o.get("until") or [] for o in options]
            stops = [[u] if isinstance(u, str) else u for u in until]
            return continuations(engine, prompts, stops, [o.get("max_gen_toks", MAX_NEW) for o in options])

    return Nanochat()
