"""A model that says what a test has told it to say, for a page in front of it."""

from __future__ import annotations

import time

import torch
from helpers.chain_server import END, OUT, OUT_END, PY, PY_END, START, TOK, Chain

from nanochat.context import Context

Piece = str | tuple[str]  # text, or (expression,) for a call of the tool


class Script(Chain):
    """say(...) sets the answer to come, a byte a token; the tool puts its result in by itself."""

    def __init__(self) -> None:
        super().__init__(sequence_len=4000)
        self._base = 0
        self.say("hello")

    def say(self, *pieces: Piece, delay_seconds: float = 0.0, is_endless: bool = False) -> None:
        """The next answers are these pieces; `is_endless` repeats the last byte for ever."""
        tokens: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                tokens += piece.encode()
            else:
                result = str(int(eval_sum(piece[0])))
                tokens += [PY, *piece[0].encode(), PY_END, OUT, *result.encode(), OUT_END]
        self._script = torch.tensor([*tokens, *([] if is_endless else [END])])
        self.delay_seconds = delay_seconds

    def forward_hidden(self, ids_BT: torch.Tensor, context: Context) -> torch.Tensor:
        positions_BT = context.positions.expand(ids_BT.shape)
        starts = positions_BT[ids_BT == START]
        if len(starts):
            self._base = int(starts.max())
        time.sleep(self.delay_seconds)
        index_BT = (positions_BT - self._base).clamp(0, len(self._script) - 1)
        return self._script[index_BT].unsqueeze(-1)


def eval_sum(text: str) -> int:
    """The value of "1 + 2 + 3": the script must be as long as what the tool will force."""
    return sum(int(part) for part in text.split("+"))


__all__ = ["TOK", "Piece", "Script"]
