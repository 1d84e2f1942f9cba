"""The engine: prompts in, tokens out, many sequences at once, with the python tool."""

from collections import abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import chat_format as chat
from nanochat.engine.calculator import ToolState
from nanochat.engine.continuous_batch import ContinuousBatch, PlainBatch
from nanochat.engine.detokenizer import TextStop
from nanochat.engine.inference import prepare
from nanochat.engine.sampling import Sampling
from nanochat.engine.sequence import Sequence
from nanochat.protocols import Model, Tokenizer

__all__ = ["Completion", "ContinuousBatch", "Engine", "Sampling", "Sequence"]


@dataclass(frozen=True)
class Completion:
    """What followed one prompt: ids and mask (1 sampled, 0 forced) without the token that ended it, stop_id.

    finish_reason is "stop" or "length"; stop_id is None unless a sampled token ended it.
    """

    ids: list[int]
    mask: list[int]
    finish_reason: str
    stop_id: int | None = None


def is_ragged(model: Model) -> bool:
    """Whether rows of this model may stand at different positions."""
    return hasattr(model, "forward_hidden")


class Engine:
    """Generates with a model and its tokenizer.

    Between calls it keeps the weights cast to `dtype`, and casts them again when the model's have changed.

    Args:
        tokenizer: needs encode_special, get_bos_token_id, encode and decode; for stop strings also
            decode_bytes and get_special_tokens.
        dtype: of the matrices; default: the model's compute dtype. int8: see inference.InferenceLinear.
        speculate: see ContinuousBatch; without effect for a model that has only `forward`.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, dtype: torch.dtype | None = None, *, speculate: int = 0
    ) -> None:
        self.model, self.tokenizer, self.dtype, self.speculate = model, tokenizer, dtype, speculate
        self._network: Any = None
        self._seen: tuple = ()
        self.stop_ids = frozenset(
            (tokenizer.encode_special(chat.ASSISTANT_END), tokenizer.get_bos_token_id())
        )

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return int(self.model.config.sequence_len)

    def start(
        self,
        prompt: abc.Sequence[int],
        sampling: Sampling,
        max_tokens: int | None = None,
        stop_ids: Iterable[int] = (),
        *,
        stop: abc.Sequence[str] = (),
        min_tokens: int = 0,
        ignore_eos: bool = False,
        top_logprobs: int | None = None,
        prompt_top_logprobs: int | None = None,
        cache_namespace: str = "",
        uses_tool: bool = True,
    ) -> Sequence:
        """A sequence ready to be admitted to a ContinuousBatch; it ends with the context at the latest.

        It ends at <|assistant_end|> and <|bos|> (unless ignore_eos) and at stop_ids, neither before
        min_tokens have come, and once its text holds a `stop` string. top_logprobs and prompt_top_logprobs
        ask for log-probabilities with so many likeliest tokens (see Sequence). Only sequences of one
        cache_namespace share cached prefixes.

        Raises ValueError for an empty prompt, one that leaves no room, or a negative max_tokens.
        """
        room = 0 if max_tokens == 0 and prompt_top_logprobs is not None else 1
        if len(prompt) + room > self.context:
            raise ValueError(
                f"the prompt must be shorter than {self.context} tokens, found {len(prompt)}; cut it"
            )
        room = self.context - len(prompt)
        ends = frozenset(stop_ids) if ignore_eos else self.stop_ids.union(stop_ids)
        return self._start(
            prompt,
            room if max_tokens is None else min(max_tokens, room),
            sampling,
            ends,
            uses_tool,
            min_tokens=min_tokens,
            text_stop=TextStop(self.tokenizer, stop) if any(stop) else None,
            top_logprobs=top_logprobs,
            prompt_top_logprobs=prompt_top_logprobs,
            cache_namespace=cache_namespace,
        )

    def _start(
        self,
        prompt: abc.Sequence[int],
        limit: int,
        sampling: Sampling,
        ends: frozenset[int],
        uses_tool: bool = True,
        **more: Any,
    ) -> Sequence:
        if not prompt:
            raise ValueError("the prompt must hold at least one token, found none; begin with <|bos|>")
        if limit < 0:
            raise ValueError(f"max_tokens must be at least 0, found {limit}")
        tool = ToolState(self.tokenizer) if uses_tool else None
        return Sequence(prompt, limit, sampling, ends, tool, **more)

    def network(self) -> Any:
        """The model as it is now, ready to run: made when first asked for, and again after a change."""
        seen = _fingerprint(self.model)
        if self._network is None or seen != self._seen:
            self._network, self._seen = prepare(self.model, self.dtype), seen
        return self._network

    def open_batch(self, num_rows: int, context: int, **how: Any) -> ContinuousBatch | PlainBatch:
        """A batch of this model; `how`: the other arguments of ContinuousBatch."""
        if is_ragged(self.model):
            how = {"speculate": self.speculate, **how}
            return ContinuousBatch(self.model, num_rows, context, network=self.network(), **how)
        return PlainBatch(self.model, num_rows, context)

    def generate(
        self,
        tokens: abc.Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        banned: abc.Sequence[int] = (),
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
                tokens,
                limit,
                Sampling(temperature, top_k, top_p, min_p, seed + i, tuple(banned)),
                self.stop_ids,
            )
            for i in range(num_samples)
        ]
        return self._columns(samples)

    def _columns(self, samples: list[Sequence]) -> Iterator[tuple[list[int], list[int]]]:
        if samples[0].limit < 1:
            return
        batch = self.open_batch(len(samples), len(samples[0].prompt) + samples[0].limit)
        yield from columns(batch, samples)

    def generate_batch(
        self, tokens: abc.Sequence[int], num_samples: int = 1, **kwargs: Any
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
        prompts: abc.Sequence[abc.Sequence[int]],
        *,
        max_tokens: int | None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | abc.Sequence[int] = 42,
        batch_size: int = 64,
        stop_ids: Iterable[int] = (),
        banned: abc.Sequence[int] = (),
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
        sequences = [
            self.start(
                prompt, Sampling(temperature, top_k, top_p, min_p, s, tuple(banned)), max_tokens, stops
            )
            for prompt, s in zip(prompts, seeds, strict=True)
        ]
        # The longest prompts first, equal ones side by side.
        waiting = sorted((g for g in sequences if g.limit), key=lambda g: (-len(g.prompt), g.prompt))
        for group in [waiting] if is_ragged(self.model) and waiting else [[g] for g in waiting]:
            self._run(group, min(batch_size, len(group)))
        return [_completion(g) for g in sequences]

    def _run(self, group: list[Sequence], num_rows: int) -> None:
        context = max((len(g.prompt) + max(1, g.limit) for g in group), default=1)
        if not is_ragged(self.model):
            batch: ContinuousBatch | PlainBatch = PlainBatch(self.model, num_rows, context)
            batch.admit(group)
        else:
            batch = self.open_batch(num_rows, context, in_bursts=True)
            batch.admit(group)
            batch.compute()
        while batch.is_running:
            batch.emit()
            batch.compute()


def columns(
    batch: ContinuousBatch | PlainBatch, samples: abc.Sequence[Sequence]
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, masks) of samples of one prompt, step by step, as Engine.generate yields them."""
    batch.admit(samples)
    while any(s.finish_reason is None for s in samples):
        running = set(map(id, batch.emit()))
        if running:
            yield [s.output[-1] for s in samples], [s.mask[-1] if id(s) in running else 0 for s in samples]
        batch.compute()


def _fingerprint(model: Model) -> tuple:
    """Changes when the weights do: versions of the parameters, and a few entries of each, since whoever
    writes through .data leaves the version as it is.
    """
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    if not parameters:
        return ()
    with torch.no_grad():
        few = [p.flatten()[:: max(1, p.numel() // 8)].float() for p in parameters]
    return tuple((p.data_ptr(), p._version) for p in parameters), tuple(torch.cat(few).tolist())


def _completion(sequence: Sequence) -> Completion:
    end = len(sequence.output) - (sequence.finish_reason == "stop")
    stop_id = sequence.output[-1] if sequence.finish_reason == "stop" else None
    return Completion(sequence.output[:end], sequence.mask[:end], sequence.finish_reason or "length", stop_id)
