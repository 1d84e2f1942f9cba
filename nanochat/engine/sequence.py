"""One prompt and what follows it: `Sequence`, the unit that everything in the engine moves around.

It holds ids and settings on the host and touches no device. Its tokens are prompt + output + forced ones that
wait to be shown; `num_computed` of them have keys and values in the cache, whose blocks `tables` names.
"""

from __future__ import annotations

from collections import abc, deque
from typing import Any, Protocol

from nanochat.engine.speculate import Lookup

TokenLogprob = tuple[float, list[tuple[int, float]]]


class Tool(Protocol):
    def feed(self, token: int) -> list[int]: ...


class StopCondition(Protocol):
    def feed(self, token: int) -> bool: ...


class Sequence:
    """One prompt and what follows it. `mask` holds 1 for a sampled token, 0 for one that the tool forced.

    finish_reason is None while it runs, then "stop" (an end token, the last of `output`, or a stop string),
    "length", or what somebody else has set to cancel it ("abort").
    logprobs, when top_logprobs is not None: for each token of `output` its log-probability (nats, of the raw
    logits) and the top_logprobs likeliest (id, log-probability), likeliest first; a forced token has
    (0.0, []). prompt_logprobs, when prompt_top_logprobs is not None: the same for each token of the prompt,
    None for the first; complete once the first token has come, or with a limit of 0 when it has finished.
    num_cached counts the prompt tokens that were found in the cache.
    """

    def __init__(
        self,
        prompt: abc.Sequence[int],
        limit: int,
        sampling: Any,
        stop_ids: frozenset[int],
        tool: Tool | None = None,
        *,
        min_tokens: int = 0,
        text_stop: StopCondition | None = None,
        top_logprobs: int | None = None,
        prompt_top_logprobs: int | None = None,
        cache_namespace: str = "",
    ) -> None:
        self.prompt, self.limit, self.sampling, self.stop_ids = list(prompt), limit, sampling, stop_ids
        self.min_tokens, self.cache_namespace = min_tokens, cache_namespace
        self.top_logprobs, self.prompt_top_logprobs = top_logprobs, prompt_top_logprobs
        self.output: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if top_logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if prompt_top_logprobs is None else [None]
        )
        self.finish_reason: str | None = "length" if limit < 1 and prompt_top_logprobs is None else None
        self._tool, self._text_stop = tool, text_stop
        self.forced: deque[int] = deque()
        # The scheduler's: how many tokens are computed, in which row (-1: none), which blocks hold them, from
        # which entry of each table on, what the full ones are known as, and whose prompt is the same.
        self.num_computed = self.num_cached = 0
        self.row = -1
        self.tables: list[list[int]] = []
        self.live_from: list[int] = []
        self.nodes: list[Any] = []
        self.leader: Sequence | None = None
        # Draft tokens that follow the known ones, and how many were proposed at once.
        self.draft: list[int] = []
        self.num_drafted = 0
        self.lookup: Lookup | None = None
        # Multi-step decoding: tokens drawn on the device and not yet taken; all but the last are computed.
        self.pending: deque[int] = deque()

    @property
    def num_tokens(self) -> int:
        """Tokens that are known: prompt, output and the forced ones still to be shown."""
        return len(self.prompt) + len(self.output) + len(self.forced)

    @property
    def lag(self) -> int:
        """Known tokens that are not computed."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start .. stop - 1: known ones, then proposed ones."""
        border = len(self.prompt)
        if stop <= border:
            return self.prompt[start:stop]
        is_short = stop <= border + len(self.output)
        later = self.output if is_short else [*self.output, *self.forced, *self.draft]
        return [*self.prompt[start:], *later[max(0, start - border) : stop - border]]

    def propose(self, most: int) -> None:
        """Guess up to `most` tokens that may follow, if the last known token is all that is to be computed.

        At most as many as leave one to be drawn within the limit.
        """
        self.draft = []
        if not self.output or self.forced or self.lag != 1:
            return
        self.lookup = self.lookup or Lookup(most)
        new = self.tokens(self.lookup.num_seen, self.num_tokens)
        self.draft = self.lookup.propose(new, self.limit - len(self.output) - 1)

    def keep_draft(self, stop: int) -> None:
        """Proposed tokens up to position stop - 1 are being computed, later ones are dropped."""
        self.draft = self.draft[: stop - self.num_tokens]
        self.num_drafted = len(self.draft)

    def check_draft(self) -> bool:
        """After a token was taken: whether it is the first proposed one, so that it is computed already and
        the logits behind it hold. Otherwise all the rest is dropped.
        """
        is_right = self.draft[:1] == self.output[-1:]
        if is_right:
            self.num_computed += 1
            del self.draft[0]
        num_kept = self.num_drafted - len(self.draft)
        goes_on = is_right and not self.forced and self.finish_reason is None
        if self.lookup is not None and self.num_drafted and not (goes_on and self.draft):
            self.lookup.judge(self.num_drafted, num_kept)
            self.num_drafted = 0
        if not goes_on:
            self.draft = []
        return goes_on

    @property
    def is_plain(self) -> bool:
        """Whether its next tokens can be drawn without the host: they depend on logits and fixed settings."""
        is_open = self.top_logprobs is None and len(self.output) >= self.min_tokens
        return is_open and not self.forced and not self.draft and not self.sampling.has_penalties

    def take_pending(self) -> None:
        """Take the next pending token. After a stop or forced text the rest is discarded."""
        self.take(self.pending.popleft())
        if self.forced or self.finish_reason is not None:
            self.pending.clear()
        elif self.pending:
            self.num_computed += 1

    @property
    def banned_now(self) -> tuple[int, ...]:
        """Tokens that must not come next: the ends, before min_tokens have come."""
        return tuple(self.stop_ids) if len(self.output) < self.min_tokens else ()

    def take(self, sampled: int, logprob: TokenLogprob | None = None) -> None:
        """Append the next token: a forced one if any waits, else the sampled one."""
        is_forced = bool(self.forced)
        token = self.forced.popleft() if is_forced else sampled
        self.output.append(token)
        self.mask.append(0 if is_forced else 1)
        if self.logprobs is not None:
            self.logprobs.append((0.0, []) if is_forced or logprob is None else logprob)
        has_stopped = self._text_stop is not None and self._text_stop.feed(token)
        if has_stopped or (not is_forced and token in self.stop_ids):
            self.finish_reason = "stop"
        elif len(self.output) >= self.limit:
            self.finish_reason = "length"
        elif not is_forced and self._tool is not None:
            self.forced.extend(self._tool.feed(token))
