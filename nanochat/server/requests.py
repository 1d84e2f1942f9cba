"""Requests into sequences: the tokens of their prompts, how they are sampled, when they end."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nanochat import chat_format as chat
from nanochat.engine import Engine, Sampling
from nanochat.engine.engine import Sequence
from nanochat.server.schemas import ApiError, ChatRequest, Common, CompletionRequest
from nanochat.server.streaming import Choice

T = TypeVar("T")


@dataclass(frozen=True)
class Defaults:
    """What counts where a request says nothing."""

    temperature: float
    top_k: int


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine: its sequences, how each is shown, prompt tokens, logprobs or not."""

    choices: list[Choice]
    num_prompt: int
    has_logprobs: bool

    @property
    def sequences(self) -> list[Sequence]:
        return [choice.sequence for choice in self.choices]


class Prompts:
    """Knows the engine's tokenizer and context; every method raises ApiError 400 for what cannot be."""

    def __init__(self, engine: Engine, defaults: Defaults) -> None:
        self._engine, self._tok, self._context, self._defaults = (
            engine,
            engine.tokenizer,
            engine.context,
            defaults,
        )
        self._max_chars = engine.context * int(engine.tokenizer.token_bytes().max())
        self._vocab = engine.tokenizer.get_vocab_size()
        special = engine.tokenizer.encode_special
        # Only the tool may say these, so that what is shown as its output is real.
        self._banned = (special(chat.OUTPUT_START), special(chat.OUTPUT_END))

    def of_chat(self, asked: ChatRequest, namespace: str) -> Prepared:
        """namespace separates the caches of different keys."""
        conversation = asked.conversation()
        num_chars = sum(
            len(part["text"]) for message in conversation["messages"] for part in message["content"]
        )
        self._check_length(num_chars, "messages")
        try:
            if asked.continue_final_message:
                ids = self._safely(lambda: chat.render(conversation, self._tok, None)[0][:-1])
            else:
                ids = self._safely(lambda: chat.render_for_completion(conversation, self._tok))
        except ValueError as error:  # it names the message and what is wrong with its role
            raise ApiError(400, str(error), param="messages") from None
        self._check_room(ids, "messages")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        choices = [
            Choice(
                self._sequence(ids, asked, asked.limit, i, top, None, namespace),
                self._tok,
                asked.stops,
                True,
            )
            for i in range(asked.n or 1)
        ]
        return Prepared(choices, len(ids), bool(asked.logprobs))

    def of_text(self, asked: CompletionRequest, namespace: str) -> Prepared:
        """Prompts of /v1/completions. One without <|bos|> is computed with a hidden one."""
        bos = self._tok.get_bos_token_id()
        choices, num_prompt = [], 0
        for prompt in asked.prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt), "prompt")
                shown: list[int] = self._safely(lambda text=prompt: self._tok.encode(text))  # type: ignore[misc]
            else:
                shown = self._checked_ids(prompt, "prompt")
            is_hidden = isinstance(prompt, str) or not shown or shown[0] != bos
            ids = [bos, *shown] if is_hidden else shown
            self._check_room(ids, "prompt")
            num_prompt += len(shown)
            echo = (self._tok.decode(shown), int(is_hidden)) if asked.echo else None
            prompt_top = asked.logprobs if asked.echo else None
            for i in range(asked.n or 1):
                sequence = self._sequence(ids, asked, asked.limit, i, asked.logprobs, prompt_top, namespace)
                choices.append(Choice(sequence, self._tok, asked.stops, False, echo))
        return Prepared(choices, num_prompt, asked.logprobs is not None)

    def _sequence(
        self,
        ids: list[int],
        asked: Common,
        limit: int | None,
        sample: int,
        top_logprobs: int | None,
        prompt_top_logprobs: int | None,
        namespace: str,
    ) -> Sequence:
        return self._engine.start(
            ids,
            self._sampling(asked, sample),
            limit,
            self._checked_ids(asked.stop_token_ids or [], "stop_token_ids"),
            stop=asked.stops,
            min_tokens=asked.min_tokens or 0,
            ignore_eos=bool(asked.ignore_eos),
            top_logprobs=top_logprobs,
            prompt_top_logprobs=prompt_top_logprobs,
            cache_namespace=namespace,
        )

    def _sampling(self, asked: Common, sample: int) -> Sampling:
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        top_k = self._defaults.top_k if asked.top_k is None else max(0, asked.top_k)
        bias = {}
        for key, value in (asked.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < self._vocab):
                raise ApiError(
                    400, f"logit_bias: keys must be token ids below {self._vocab}", param="logit_bias"
                )
            bias[int(key)] = value
        return Sampling(
            self._defaults.temperature if asked.temperature is None else asked.temperature,
            top_k,
            1.0 if asked.top_p is None else asked.top_p,
            asked.min_p or 0.0,
            seed + sample,
            self._banned,
            bias,
            asked.repetition_penalty or 1.0,
            asked.presence_penalty or 0.0,
            asked.frequency_penalty or 0.0,
        )

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text; a text that is exactly a special token's name gives its id."""
        if text in self._tok.get_special_tokens():
            return [self._tok.encode_special(text)]
        return self._safely(lambda: self._tok.encode(text))

    def detokenize(self, ids: list[int]) -> str:
        return str(self._tok.decode(self._checked_ids(ids, "tokens")))

    def tokenizer_info(self) -> dict[str, Any]:
        return {"bos_token": chat.BOS, "eos_token": chat.ASSISTANT_END, "pad_token": chat.ASSISTANT_END}

    def _checked_ids(self, ids: list[int], param: str) -> list[int]:
        if not all(0 <= index < self._vocab for index in ids):
            raise ApiError(400, f"token ids must be at least 0 and below {self._vocab}", param=param)
        return ids

    def _check_length(self, num_chars: int, param: str) -> None:
        """Refuse what cannot fit before tokenizing it: long texts make tokenizers slow."""
        if num_chars > self._max_chars:
            raise ApiError(400, f"the {param} cannot fit", "context_length_exceeded", param)

    def _check_room(self, ids: list[int], param: str) -> None:
        if len(ids) >= self._context:
            message = f"the model reads {self._context} tokens, answer included; the {param} has {len(ids)}"
            raise ApiError(400, message, "context_length_exceeded", param)

    def _safely(self, work: Callable[[], T]) -> T:
        """The result of a call of the tokenizer, whose native code may panic (a BaseException)."""
        try:
            return work()
        except (ValueError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            raise ApiError(400, "the tokenizer cannot read this text") from None
