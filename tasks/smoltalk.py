"""SmolTalk (HuggingFaceTB/smol-smoltalk): general conversations, for training only."""

from __future__ import annotations

from typing import Any

from nanochat.home import Home
from tasks.base import Conversation
from tasks.custom import check_messages
from tasks.hub_task import HubTask


class SmolTalk(HubTask):
    """Conversations as they stand; a system message at the beginning is kept (rendering merges it)."""

    name = "smoltalk"

    def __init__(self, split: str, home: Home | None = None, **slice_: Any):
        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, found {split!r}")
        super().__init__(
            "HuggingFaceTB/smol-smoltalk", f"data/{split}-*.parquet", ("messages",), home, **slice_
        )

    def get_example(self, index: int) -> Conversation:
        messages = [{"role": m["role"], "content": m["content"]} for m in self.row(index)["messages"]]
        problem = check_messages(messages)
        if problem:
            raise ValueError(f"row {index} of {self.repo} {self.pattern}: {problem}")
        return {"messages": messages}
