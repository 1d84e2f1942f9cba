"""Guessing what a sequence will say next from what it holds already. Imports no torch.

Prompt-lookup decoding (Saxena 2023; the draft-and-verify rule of Leviathan et al. 2023, arXiv 2211.17192,
here with a draw that is fixed beforehand): when the last few tokens have occurred before, what followed them
then is proposed. All proposed tokens are computed in one step together with the last known one; a proposed
token is kept where it equals the token that is drawn there anyway, so that no output changes.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (4, 3, 2)  # lengths that are looked up, the longest first
FIRST_SIZE = 2  # tokens of the first proposal


class Lookup:
    """Where the n-grams of one growing sequence occurred last, and how much it pays to trust them.

    A proposal doubles when all of the last one was right and halves when none of it was, up to `most`.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"a proposal must hold at least 1 token, found {most}")
        self.most, self.size = most, min(most, FIRST_SIZE)
        self.num_proposed = self.num_kept = 0
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed it last

    def propose(self, new: Sequence[int], room: int) -> list[int]:
        """Up to `room` tokens that may follow, none if nothing is known. new: tokens since the last call."""
        for token in new:
            count = len(self._ids)  # n-grams that end here: now something follows them
            for n in NGRAMS:
                if count >= n:
                    self._after[tuple(self._ids[-n:])] = count
            self._ids.append(token)
        wanted = min(self.size, room)
        at = next((self._after[key] for n in NGRAMS if (key := tuple(self._ids[-n:])) in self._after), None)
        if at is None or wanted < 1:
            return []
        found = self._ids[at : at + wanted]
        while len(found) < wanted:  # the repetition reaches to the end: it goes on with itself
            found.append(found[len(found) - (len(self._ids) - at)])
        return found

    @property
    def num_seen(self) -> int:
        """Tokens that it has been told."""
        return len(self._ids)

    def judge(self, num_proposed: int, num_kept: int) -> None:
        """What became of a proposal."""
        self.num_proposed += num_proposed
        self.num_kept += num_kept
        if num_kept == num_proposed:
            self.size = min(self.most, 2 * self.size)
        elif num_kept == 0:
            self.size = max(1, self.size // 2)
