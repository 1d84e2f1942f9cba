"""Hooks that evaluate and sample. Each is a function of the TrainState; loop.every says when it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.protocols import Tokenizer
from nanochat.runtime import Runtime
from nanochat.train.loop import Hook, TrainState

# Compute an evaluation: (the value that should become small, everything that is recorded).
Evaluate = Callable[[], tuple[float, dict[str, float]]]


def evaluation(evaluate: Evaluate, rt: Runtime) -> Hook:
    """Run an evaluation, record its results and print them; state.best remembers the smallest value."""

    def hook(state: TrainState) -> None:
        start = time.perf_counter()
        value, results = evaluate()
        seconds = time.perf_counter() - start
        state.value = value
        if math.isfinite(value) and (state.best is None or value < state.best):
            state.best = value
        state.metrics.write(step=state.step, eval_seconds=round(seconds, 3), **results)
        rt.say(f"step {state.step}: {shown(results)} ({seconds:.1f} s)")

    return hook


def shown(results: dict[str, float]) -> str:
    """Results as a line of text."""
    return ", ".join(f"{name} {value:.5f}" for name, value in results.items())


def samples(model: GPT, tok: Tokenizer, prompts: Sequence[str], rt: Runtime, max_tokens: int = 32) -> Hook:
    """Continue each prompt greedily on rank 0, print and record the texts."""

    def hook(state: TrainState) -> None:
        if rt.is_main:
            was_training = model.training
            model.eval()
            ids = [tok.encode(prompt, prepend=tok.get_bos_token_id()) for prompt in prompts]
            completions = Engine(model, tok).complete(ids, max_tokens=max_tokens, temperature=0.0)
            model.train(was_training)
            special_ids = {tok.encode_special(name) for name in tok.get_special_tokens()}
            texts = [
                prompt + tok.decode([i for i in completion.ids if i not in special_ids])
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            state.metrics.write(step=state.step, samples=texts)
            rt.say("\n".join(f"  | {text.strip()}" for text in texts))
        rt.barrier()

    return hook
