"""The engine: prompts in, tokens out, many sequences at once, with the python tool.

Sequences share forward passes and nothing else: what one draws depends on its own tokens, seed and settings.
A step has two halves, so that a token can be shown before the next one is computed: `Batch.emit` chooses a
token per row, `Batch.compute` runs the model on them. Prompt reuse between calls and preemption are not here.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import chat
from nanochat.engine.runner import PlainRunner, Runner
from nanochat.engine.sampling import Sampling, sample
from nanochat.engine.tools import ToolState


class Generation:
    """One prompt and what follows it. `mask` holds 1 for a sampled token, 0 for one that the tool forced.

    finish_reason is None while it runs, then "stop" (the last token of `output` ended it) or "length".
    """

    def __init__(
        self, prompt: list[int], limit: int, sampling: Sampling, stop_ids: frozenset[int], tool: ToolState
    ) -> None:
        self.prompt, self.limit, self.sampling, self.stop_ids = prompt, limit, sampling, stop_ids
        self.output: list[int] = []
        self.mask: list[int] = []
        self.finish_reason: str | None = "length" if limit < 1 else None
        self._tool = tool
        self._forced: deque[int] = deque()

    def take(self, sampled: int) -> None:
        """Append the next token: a forced one if any waits, else the sampled one."""
        is_forced = bool(self._forced)
        token = self._forced.popleft() if is_forced else sampled
        self.output.append(token)
        self.mask.append(0 if is_forced else 1)
        if not is_forced and token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.output) >= self.limit:
            self.finish_reason = "length"
        else:
            self._forced.extend(self._tool.feed(token))


@dataclass(frozen=True)
class Completion:
    """What followed one prompt: ids and mask (1 sampled, 0 forced) without the token that ended it, stop_id.

    finish_reason is "stop" or "length"; stop_id is None unless a sampled token ended it.
    """

    ids: list[int]
    mask: list[int]
    finish_reason: str
    stop_id: int | None = None


def is_ragged(model: Any) -> bool:
    """Whether rows of this model may stand at different positions."""
    return hasattr(model, "trunk")


class Batch:
    """Rows that are decoded together. They join whenever there is room and leave as they finish."""

    def __init__(self, model: Any, num_rows: int, seq_len: int) -> None:
        self.num_rows, self.rows = num_rows, list[Generation]()
        self._runner = (Runner if is_ragged(model) else PlainRunner)(model, num_rows, seq_len)
        self._logits_BV: torch.Tensor | None = None

    @property
    def room(self) -> int:
        return self.num_rows - len(self.rows)

    @property
    def is_running(self) -> bool:
        return any(row.finish_reason is None for row in self.rows)

    def admit(self, generations: Sequence[Generation]) -> None:
        """Compute the prompts, each different one once, and add the rows. Call it before `emit`."""
        first_row: dict[tuple[int, ...], int] = {}
        firsts: list[Generation] = []
        copies: list[Generation] = []
        sources: list[int] = []
        for generation in generations:
            key = tuple(generation.prompt)
            if key in first_row:
                copies.append(generation)
                sources.append(first_row[key])
            else:
                first_row[key] = len(self.rows) + len(firsts)
                firsts.append(generation)
        new_BV = self._runner.prefill([generation.prompt for generation in firsts])
        if copies:
            self._runner.copy(sources)
            new_BV = torch.cat([new_BV, new_BV[[source - len(self.rows) for source in sources]]])
        old_BV = self._logits_BV if self.rows else None
        self._logits_BV = new_BV if old_BV is None else torch.cat([old_BV, new_BV])
        self.rows += firsts + copies

    def emit(self) -> list[Generation]:
        """Give every running row its next token; returns those rows. Finished ones leave the batch.

        A row leaves too when somebody else has set its finish_reason.
        """
        assert self._logits_BV is not None
        positions = [len(row.prompt) + len(row.output) for row in self.rows]
        tokens = sample(self._logits_BV, [row.sampling for row in self.rows], positions)
        running = []
        for row, token in zip(self.rows, tokens, strict=True):
            if row.finish_reason is None:
                row.take(token)
                running.append(row)
        if self._runner.can_drop:
            for i in reversed(range(len(self.rows))):
                if self.rows[i].finish_reason is not None:
                    self._runner.drop(i)
                    self.rows[i] = self.rows[-1]
                    self.rows.pop()
        return running

    def compute(self) -> None:
        """Run the model on the last token of every row."""
        if self.is_running:
            self._logits_BV = self._runner.decode([row.output[-1] for row in self.rows])


class Engine:
    """Generates with a model and its tokenizer; holds no state between calls.

    The tokenizer needs encode_special, get_bos_token_id, encode and decode.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = frozenset(
            (tokenizer.encode_special(chat.ASSISTANT_END), tokenizer.get_bos_token_id())
        )

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return int(self.model.config.sequence_len)

    def start(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_tokens: int | None = None,
        stop_ids: Iterable[int] = (),
    ) -> Generation:
        """A sequence ready to be admitted to a Batch; it ends with the context at the latest.

        Raises ValueError for an empty prompt, one that leaves no room, or a negative max_tokens.
        """
        if len(prompt) >= self.context:
            raise ValueError(
                f"the prompt must be shorter than {self.context} tokens, found {len(prompt)}; cut it"
            )
        room = self.context - len(prompt)
        return self._start(prompt, room if max_tokens is None else min(max_tokens, room), sampling, stop_ids)

    def _start(
        self, prompt: Sequence[int], limit: int, sampling: Sampling, stop_ids: Iterable[int]
    ) -> Generation:
        if not prompt:
            raise ValueError("the prompt must hold at least one token, found none; begin with <|bos|>")
        if limit < 0:
            raise ValueError(f"max_tokens must be at least 0, found {limit}")
        return Generation(
            list(prompt), limit, sampling, self.stop_ids.union(stop_ids), ToolState(self.tokenizer)
        )

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        banned: Sequence[int] = (),
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token_column, token_masks), one entry per sample; mask 1 sampled, 0 forced.

        Sample i draws with seed + i. The token that ends a sample is yielded, then repeated with mask 0 until
        all have ended. Without max_tokens (which counts forced tokens too), stops at the context's end.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, found {num_samples}")
        limit = max(0, self.context - len(tokens)) if max_tokens is None else max_tokens
        samples = [
            self._start(
                tokens, limit, Sampling(temperature, top_k, top_p, min_p, seed + i, tuple(banned)), ()
            )
            for i in range(num_samples)
        ]
        return self._columns(samples)

    def _columns(self, samples: list[Generation]) -> Iterator[tuple[list[int], list[int]]]:
        if samples[0].limit < 1:
            return
        batch = Batch(self.model, len(samples), len(samples[0].prompt) + samples[0].limit)
        batch.admit(samples)
        while True:
            running = set(map(id, batch.emit()))
            yield [s.output[-1] for s in samples], [s.mask[-1] if id(s) in running else 0 for s in samples]
            if all(s.finish_reason for s in samples):
                return
            batch.compute()

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(results, masks) of `generate` read to its end: prompt (mask 0), output without its last stop."""
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        ended = [False] * num_samples
        for column, column_masks in self.generate(tokens, num_samples, **kwargs):
            for i, (token, mask) in enumerate(zip(column, column_masks, strict=True)):
                ended[i] = ended[i] or token in self.stop_ids
                if not ended[i]:
                    results[i].append(token)
                    masks[i].append(mask)
        return results, masks

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = 42,
        batch_size: int = 64,
        stop_ids: Iterable[int] = (),
        banned: Sequence[int] = (),
    ) -> list[Completion]:
        """One Completion per prompt, in their order; up to batch_size of them run at a time.

        Each is what it would be alone (batching moves only the last bits of logits). `seed` is shared by all,
        or one per prompt: equal prompts are computed once and need different seeds to differ. stop_ids end an
        answer beside <|assistant_end|> and <|bos|>. Raises ValueError for a prompt that fills the context.
        """
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts) or batch_size < 1:
            raise ValueError(
                f"needs a seed per prompt and batch_size >= 1, found {len(seeds)} and {batch_size}"
            )
        stops = frozenset(stop_ids)
        generations = [
            self.start(
                prompt, Sampling(temperature, top_k, top_p, min_p, s, tuple(banned)), max_tokens, stops
            )
            for prompt, s in zip(prompts, seeds, strict=True)
        ]
        # The longest prompts first, equal ones side by side.
        waiting = sorted((g for g in generations if g.limit), key=lambda g: (-len(g.prompt), g.prompt))
        for group in [waiting] if is_ragged(self.model) else [[g] for g in waiting]:
            self._run(deque(group), min(batch_size, len(group)))
        return [_completion(g) for g in generations]

    def _run(self, waiting: deque[Generation], num_rows: int) -> None:
        batch = Batch(self.model, num_rows, max((len(g.prompt) + g.limit for g in waiting), default=0))
        while waiting or batch.is_running:
            # Admitting several at a time keeps their padding and the number of passes low.
            if waiting and batch.room >= min(len(waiting), max(1, num_rows // 4)):
                batch.admit([waiting.popleft() for _ in range(min(batch.room, len(waiting)))])
            batch.emit()
            batch.compute()


def _completion(generation: Generation) -> Completion:
    end = len(generation.output) - (generation.finish_reason == "stop")
    stop_id = generation.output[-1] if generation.finish_reason == "stop" else None
    return Completion(
        generation.output[:end], generation.mask[:end], generation.finish_reason or "length", stop_id
    )
