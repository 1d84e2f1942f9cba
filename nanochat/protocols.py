"""What the library needs of a model that it measures or generates with, and of a tokenizer.

GPT and RustBPETokenizer are the ones that people use; GPT-2 for comparison and small models of tests have the
same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanochat.context import Context


class Model(Protocol):
    """A network that turns token ids into hidden states, and these into logits.

    config has at least vocab_size, sequence_len and n_layer; for the engine also the heads and the width.
    """

    @property
    def config(self) -> Any: ...

    def get_device(self) -> torch.device: ...

    def forward_hidden(self, ids_BT: Tensor, context: Context) -> Tensor:
        """Final hidden states (B, T, D)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of hidden states (..., D)."""


class Tokenizer(Protocol):
    """Text to token ids and back, and conversations in the chat format."""

    def encode(self, text: Any, prepend: Any = None) -> Any: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...

    def encode_special(self, name: str) -> int: ...

    def get_bos_token_id(self) -> int: ...

    def get_special_tokens(self) -> Any: ...

    def get_vocab_size(self) -> int: ...

    def fingerprint(self) -> str: ...

    def token_bytes(self) -> Any: ...

    def encode_arrow(self, *args: Any, **kwargs: Any) -> Any: ...

    def render_conversation(self, *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]: ...

    def render_for_completion(self, conversation: Any) -> list[int]: ...
