"""Hooks that evaluate and sample. Each is a function of the TrainState; `every` says when it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.engine import Engine
from nanochat.runtime import Runtime
from nanochat.train.loop import Hook, TrainState


def evaluation(key: str, compute: Callable[[], float], rt: Runtime) -> Hook:
    """Compute a value (lower is better) and record it under `key`; state.best remembers the best one."""

    def hook(state: TrainState) -> None:
        start = time.perf_counter()
        value = compute()
        seconds = time.perf_counter() - start
        if math.isfinite(value) and (state.best is None or value < state.best):
            state.best = value
        state.value = value
        state.metrics.write(step=state.step, eval_seconds=round(seconds, 3), **{key: value})
        rt.say(f"step {state.step}: {key} {value:.5f} ({seconds:.1f} s)")

    return hook


def samples(model: Any, tok: Any, prompts: Sequence[str], rt: Runtime, max_tokens: int = 32) -> Hook:
    """Continue each prompt greedily on rank 0, print and record the texts."""

    def hook(state: TrainState) -> None:
        if rt.is_main:
            was_training = model.training
            model.eval()
            ids = [tok.encode(prompt, prepend=tok.get_bos_token_id()) for prompt in prompts]
            done = Engine(model, tok).complete(ids, max_tokens=max_tokens, temperature=0.0)
            specials = {tok.encode_special(name) for name in tok.get_special_tokens()}
            texts = [
                prompt + tok.decode([i for i in completion.ids if i not in specials])
                for prompt, completion in zip(prompts, done, strict=True)
            ]
            model.train(was_training)
            state.metrics.write(step=state.step, samples=texts)
            rt.say("\n".join(f"  | {text.strip()}" for text in texts))
        rt.barrier()

    return hook
