"""Steps of single tokens with shapes that do not change, so that a GPU can replay them as one graph, and
several of them before the host reads what was drawn.

A small model's step is some hundred kernels, each of which takes longer to launch than to run. A graph of
them is captured once for a number of rows and a length of block tables and replayed with one launch: numbers
and tables are copied into buffers that the graph reads, rows that are missing compute a dummy (block 0, which
nobody reads), logits come out. Whatever fails to be captured runs as before, and stderr says why.
Letters: B rows of the graph, W blocks of a table, D width, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import nanochat.flash_attention as fa
from nanochat.engine.inference import forward_tokens
from nanochat.engine.kv_cache import PagedCache
from nanochat.engine.sampling import Draws
from nanochat.engine.scheduler import Chunk
from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.select import pick
from nanochat.protocols import Model

SHORTEST = 8  # blocks of a table; longer ones double
WARM_UPS = 2  # runs before a capture: libraries allocate and choose their kernels


class Graph(Protocol):
    """What was recorded of a function without arguments; `output` is overwritten by each replay."""

    output: tuple[Tensor, Tensor]

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], tuple[Tensor, Tensor]], Any], Graph]


class CudaGraph:
    """A function captured on the current GPU; its memory comes from `pool`, which several may share."""

    def __init__(self, run: Callable[[], tuple[Tensor, Tensor]], pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of a server may use the GPU meanwhile
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self) -> None:
        self._graph.replay()


def rows_of(count: int) -> int:
    """Rows of the graph that serves `count`: 1, 2, 4, then multiples of 8."""
    return next((rows for rows in (1, 2, 4) if count <= rows), -(-count // 8) * 8)


def blocks_of(count: int) -> int:
    """Blocks a table of the graph that serves tables of `count`: SHORTEST times a power of two."""
    return max(SHORTEST, 1 << (count - 1).bit_length())


class StaticSteps:
    """Graphs of one model over one paged cache, captured when first needed.

    place: layer -> (group, index within it); windows by group, -1 for everything. A step is (hidden (n, D),
    logits (n, V)) of n <= most rows, or None for what must run another way.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        place: dict[int, tuple[int, int]],
        windows: Sequence[int],
        num_kv_heads: int,
        device: torch.device,
        capture: Capture = CudaGraph,
        most: int = 256,
    ) -> None:
        self.model = model
        self.cache = cache
        self.place = place
        self.windows = windows
        self.num_kv_heads = num_kv_heads
        self.device = device
        self.capture = capture
        self.most = most
        self.problem: str | None = None
        self._graphs: dict[tuple[int, int], tuple[Graph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.no_grad()
    def __call__(
        self, chunks: Sequence[Chunk], ids: list[int], prev: list[int], positions: list[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Compute these single tokens, whose blocks are reserved; writes keys and values."""
        found = self._ready(chunks, ids, prev, positions, 1)
        if found is None:
            return None
        graph = found[0]
        graph.replay()
        hidden_BD, logits_BV = (output[: len(ids)] for output in graph.output)
        return hidden_BD.clone(), logits_BV.clone()  # the next replay writes over them

    @torch.no_grad()
    def draw_steps(
        self, chunks: Sequence[Chunk], ids: list[int], prev: list[int], positions: list[int],
        draws: Draws, steps: int,
    ) -> list[list[int]] | None:  # fmt: skip
        """The next `steps` tokens of each row, drawn and fed back on the device: the host waits once, at the
        end. Blocks must be reserved for all but the last of them.
        """
        found = self._ready(chunks, ids, prev, positions, steps)
        if found is None:
            return None
        graph, static_3B = found
        count, drawn = len(ids), list[Tensor]()
        ids_B, prev_B, positions_B = (row[:count] for row in static_3B)
        for step in range(steps):
            if step:
                prev_B.copy_(ids_B)
                ids_B.copy_(drawn[-1])
                positions_B.add_(1)
            graph.replay()
            drawn.append(draws(graph.output[1][:count], step))
        tokens: list[list[int]] = torch.stack(drawn, dim=1).tolist()
        return tokens

    def _ready(
        self, chunks: Sequence[Chunk], ids: list[int], prev: list[int], positions: list[int], steps: int
    ) -> tuple[Graph, Tensor] | None:
        """The graph for these rows and its numbers (ids, prev, positions), filled in; None: see `problem`."""
        count = len(chunks)
        if self.problem or count > self.most or any(chunk.stop - chunk.start != 1 for chunk in chunks):
            return None
        size = self.cache.block_size
        rows, blocks = rows_of(count), blocks_of((max(positions) + steps - 1) // size + 1)
        spare = rows - count
        numbers_3B = torch.tensor(
            [[*ids, *[0] * spare], [*prev, *[-1] * spare], [*positions, *[0] * spare]], dtype=torch.int64
        )
        empty = [0] * blocks
        tables_GBW = torch.tensor(
            [
                [*((chunk.sequence.tables[group] + empty)[:blocks] for chunk in chunks), *[empty] * spare]
                for group in range(len(self.windows))
            ],
            dtype=torch.int32,
        )
        found = self._graphs.get((rows, blocks))
        if found is None:
            found = self._captured(numbers_3B.to(self.device), tables_GBW.to(self.device))
            if found is None:
                return None
            self._graphs[rows, blocks] = found
        graph, static_3B, static_GBW = found
        static_3B.copy_(numbers_3B)
        static_GBW.copy_(tables_GBW)
        return graph, static_3B

    def _captured(self, static_3B: Tensor, static_GBW: Tensor) -> tuple[Graph, Tensor, Tensor] | None:
        """Running it while capturing is harmless: it writes the same keys and values as the replay."""

        def run() -> tuple[Tensor, Tensor]:
            attend = self._attend(static_3B[2], static_GBW)
            hidden_BD = forward_tokens(self.model, static_3B[0], static_3B[1], static_3B[2], attend)
            return hidden_BD, self.model.logits(hidden_BD)

        try:
            return self.capture(run, self._pool), static_3B, static_GBW
        except Exception as error:  # whatever a driver or a kernel raises is its reason, and is shown
            self.problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"engine: steps are launched one kernel at a time, because {self.problem}", file=sys.stderr)
            return None

    def _attend(self, positions_B: Tensor, tables_GBW: Tensor) -> Any:
        K, size, dtype = self.num_kv_heads, self.cache.block_size, self.cache.dtype
        backend = pick(fa._override_impl, self.device, dtype)

        def attend(layer: int, q_BHE: Tensor, kv_B2KE: Tensor) -> Tensor:
            group, i = self.place[layer]
            store_PS2KE = self.cache.kv[group][i].unflatten(0, (-1, size))
            kv = kv_B2KE.to(dtype).unsqueeze(1)
            keys, values = store_PS2KE[:, :, :K], store_PS2KE[:, :, K:]
            cache = Cache(keys, values, positions_B, None, tables_GBW[group])
            cache = cache.append(kv[:, :, :K], kv[:, :, K:])
            left = None if self.windows[group] < 0 else self.windows[group]
            y_B1HE = backend.attend_cache(q_BHE.to(dtype).unsqueeze(1), cache, left, 0)
            y_BHE: Tensor = y_B1HE.squeeze(1).to(q_BHE.dtype)
            return y_BHE

        return attend
