"""MuonAdamW and its sharding (ZeRO-2): gradients are reduced to their owners, who update and share weights.

Each unit (one shape of Muon matrices, one large AdamW tensor, or the small AdamW tensors of a group) goes
through reduce -> update -> gather. One process, gloo and NCCL share the path; alone, a unit works on the
parameters and their gradients directly and needs no buffers. With several ranks the last backward pass of a
step starts each unit's reduction as soon as its gradients are complete (`overlap`), and gathers may run on
under the next forward pass (nanochat/optim/gathers.py).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from nanochat.optim import adamw, muon
from nanochat.optim.prepare import parse, prepared

KINDS = {"muon": muon.DEFAULTS, "adamw": adamw.DEFAULTS}  # of parameter groups

Named = list[tuple[str, torch.Tensor]]
PARTS = 4  # of a stack of matrices, over the backward pass
REPLICATED_BELOW = 1024  # elements; smaller AdamW tensors are all-reduced and updated on every rank


class Slice(NamedTuple):
    """A piece of optimizer state: `tensor` holds the elements from `offset` of a flat tensor of `shape`."""

    key: str  # moment|parameter
    offset: int
    shape: tuple[int, ...]
    tensor: torch.Tensor
    is_replica: bool  # the same on every rank: rank 0 saves it


class Ranks:
    """The default process group, or one process alone. Collectives are in place and asynchronous."""

    def __init__(self, device: torch.device):
        grouped = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if grouped else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.can_scatter = self.size > 1 and self._probe(device)

    def _probe(self, device: torch.device) -> bool:
        """gloo lacks reduce_scatter in some versions; then all-reduce does, at twice the traffic."""
        full = torch.ones(self.size, device=device)
        try:
            dist.reduce_scatter_tensor(full[self.rank : self.rank + 1], full)
        except (RuntimeError, NotImplementedError):
            return False
        return bool(full[self.rank] == self.size)

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        chunk = full.shape[0] // self.size
        return full[self.rank * chunk : (self.rank + 1) * chunk]

    def reduce_scatter(self, full: torch.Tensor) -> Any:
        """Sum over ranks; afterwards this rank's shard of `full` is valid."""
        if self.can_scatter:
            return dist.reduce_scatter_tensor(self.shard(full), full, async_op=True)
        return self.all_reduce(full)

    def all_reduce(self, full: torch.Tensor) -> Any:
        return dist.all_reduce(full, async_op=True)

    def all_gather(self, full: torch.Tensor) -> Any:
        return dist.all_gather_into_tensor(full, self.shard(full), async_op=True)


class Unit:
    """Some parameters of one group on their way through reduce, update, gather.

    With several ranks they lie in `full`, back to back, as `count` items; each rank owns ceil(count / P)
    of them; zeros fill the end.
    """

    def __init__(self, group: dict[str, Any], named: Named, ranks: Ranks, count: int, is_sharded: bool):
        self.group, self.ranks, self.is_sharded = group, ranks, is_sharded
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        self.numel = sum(p.numel() for p in self.params)
        size, rank = (ranks.size, ranks.rank) if is_sharded else (1, 0)
        chunk = -(-count // size)
        self.owned = slice(min(rank * chunk, count), min((rank + 1) * chunk, count))
        self.full: torch.Tensor | None = None
        if ranks.size > 1:
            self.full = self.params[0].new_zeros(chunk * size, self.numel // count)
            self.slots = self.full.view(-1)[: self.numel].split([p.numel() for p in self.params])
            self.padding = self.full.view(-1)[self.numel :]
            targets = self.targets()
            parts = self.full[self.owned].view(-1).split([t.numel() for t in targets])
            self.mine = [part.view_as(t) for part, t in zip(parts, targets)]
        self.grads: list[torch.Tensor] = []
        self.work: Any = None
        self.is_started, self.is_gathering = False, False
        self.missing = 0  # gradients that the last backward pass still owes

    def targets(self) -> list[torch.Tensor]:
        """The pieces of the parameters that this rank updates."""
        raise NotImplementedError

    def reduce(self) -> None:
        # No gradient means zeros: a parameter unused on one rank must still take part in the collective.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if self.full is None:
            self.grads = [g.reshape(t.shape) for g, t in zip(grads, self.targets())]
            return
        self.is_started = True
        self.padding.zero_()
        torch._foreach_copy_(self.slots, [g.reshape(-1) for g in grads])
        start = self.ranks.reduce_scatter if self.is_sharded else self.ranks.all_reduce
        self.work = start(self.full)

    def arrive(self) -> list[torch.Tensor]:
        """Wait; the gradients of `targets()`, summed over ranks."""
        if self.full is not None:
            self.work.wait()
            self.grads = self.mine
        self.is_started = False
        return self.grads

    def gather(self) -> None:
        self.grads = []
        if self.full is not None and self.is_sharded:
            if self.mine:
                torch._foreach_copy_(self.mine, self.targets())
            self.work, self.is_gathering = self.ranks.all_gather(self.full), True

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the gather that is under way, if one is, and take the weights."""
        if self.is_gathering:
            self.is_gathering = False
            self.work.wait()
            torch._foreach_copy_([p.detach().view(-1) for p in self.params], self.slots)


class MuonUnit(Unit):
    """All matrices of one shape: an item is a matrix."""

    def __init__(self, group: dict[str, Any], named: Named, ranks: Ranks):
        super().__init__(group, named, ranks, count=len(named), is_sharded=True)
        num_owned, (rows, cols) = len(self.targets()), self.params[0].shape
        self.momentum_nRC = self.params[0].new_zeros(num_owned, rows, cols)
        self.second_nL = self.params[0].new_zeros(num_owned, max(rows, cols))

    def targets(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.params[self.owned]]

    def update(self) -> None:
        if self.grads:
            options = {key: self.group[key] for key in ("lr", *muon.DEFAULTS)}
            muon.muon_(self.targets(), self.grads, self.momentum_nRC, self.second_nL, **options)

    def slices(self) -> Iterator[Slice]:
        """Every matrix, empty where another rank owns it."""
        for i, name in enumerate(self.names, start=-self.owned.start):
            for moment, stack in (("momentum", self.momentum_nRC), ("second", self.second_nL)):
                item = stack[i] if 0 <= i < len(stack) else stack[:0]
                yield Slice(f"muon.{moment}|{name}", 0, tuple(stack.shape[1:]), item.view(-1), False)


class AdamWUnit(Unit):
    """One large tensor sharded, or tensors that every rank updates whole: an item is an element."""

    def __init__(self, group: dict[str, Any], named: Named, ranks: Ranks, is_sharded: bool):
        super().__init__(group, named, ranks, sum(p.numel() for _, p in named), is_sharded)
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(t) for t in self.targets()] for _ in range(2))
        self.steps = [p.new_zeros(()) for p in self.params]

    def targets(self) -> list[torch.Tensor]:
        flat = [p.detach().view(-1) for p in self.params]
        return [flat[0][self.owned]] if self.is_sharded else flat

    def update(self) -> None:
        options = {key: self.group[key] for key in ("lr", *adamw.DEFAULTS)}
        adamw.adamw_(self.targets(), self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **options)

    def slices(self) -> Iterator[Slice]:
        offset, is_replica = self.owned.start, not self.is_sharded
        for name, p, m, v, step in zip(self.names, self.params, self.exp_avgs, self.exp_avg_sqs, self.steps):
            yield Slice(f"adamw.exp_avg|{name}", offset, tuple(p.shape), m, is_replica)
            yield Slice(f"adamw.exp_avg_sq|{name}", offset, tuple(p.shape), v, is_replica)
            yield Slice(f"adamw.step|{name}", 0, (1,), step.view(1), True)


def units_of(group: dict[str, Any], ranks: Ranks) -> list[MuonUnit | AdamWUnit]:
    named = list(zip(group["param_names"], group["params"]))
    if group["kind"] == "muon":
        shapes = dict.fromkeys(p.shape for _, p in named)
        stacks = [[(n, p) for n, p in named if p.shape == shape] for shape in shapes]
        return [MuonUnit(group, part, ranks) for stack in stacks for part in parts_of(stack, ranks.size)]
    whole = [(n, p) for n, p in named if ranks.size == 1 or p.numel() < REPLICATED_BELOW]
    names = {n for n, _ in whole}
    units = [AdamWUnit(group, [(n, p)], ranks, is_sharded=True) for n, p in named if n not in names]
    return [*units, AdamWUnit(group, whole, ranks, is_sharded=False)] if whole else [*units]


def parts_of(stack: Named, num_ranks: int) -> list[Named]:
    """Parts of a stack whose gradients come at different times: the last layers' first; alone, one part.

    Every part but the one of the first layers is a multiple of the ranks, so that little is padded.
    """
    size = num_ranks * max(1, math.ceil(len(stack) / (PARTS * num_ranks)))
    if num_ranks == 1 or size >= len(stack):
        return [stack]
    ends = list(range(len(stack), 0, -size))
    return [stack[max(0, end - size) : end] for end in ends]


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, for one process or for the default process group.

    Groups are dicts with kind ("muon" | "adamw"), params (tensors or (name, tensor) pairs), lr, and
    optionally weight_decay; betas, eps (adamw); momentum, beta2, ns_steps, ns_dtype (muon). Parameters are
    contiguous fp32; Muon's are matrices. Every rank must build the same groups in the same order.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]):
        super().__init__(list(param_groups), {})
        seen: set[Any] = set()
        pairs = (zip(group["param_names"], group["params"]) for group in self.param_groups)
        for name, p in itertools.chain.from_iterable(pairs):
            if name in seen or id(p) in seen:
                raise ValueError(f"{name}: each parameter and each name may occur only once over all groups")
            seen |= {name, id(p)}
        self.ranks = Ranks(self.param_groups[0]["params"][0].device)
        units = [unit for group in self.param_groups for unit in units_of(group, self.ranks)]
        self.units = sorted(units, key=lambda unit: -unit.numel)  # the longest transfers start first
        self.is_reduced = False
        self.is_overlapping, self.is_ordered = False, False
        self.completed: list[Unit] = []  # in the order in which the first overlapped pass completed them
        self.order_of_use: Callable[[Unit], int] | None = None  # gathers.overlap: they run on after update()
        if self.ranks.size > 1:
            for unit in self.units:
                for p in unit.params:
                    p.register_post_accumulate_grad_hook(lambda p, unit=unit: self._arrived(unit))

    def overlap(self) -> None:
        """Call before the last backward pass of a step: reductions then start while it runs; reduce() ends
        them.

        The order of collectives must be the same on all ranks: a unit waits for those before it, in an
        order that rank 0 observes in the first such pass. Nothing to do for one process.
        """
        self.is_overlapping = self.ranks.size > 1
        self.finish()  # what this rank has not used: its buffers are needed now
        for unit in self.units:
            unit.missing = len(unit.params)

    def _arrived(self, complete: Unit) -> None:
        """One more gradient of this unit is complete."""
        if not self.is_overlapping:
            return
        complete.missing -= 1
        if not self.is_ordered:
            self.completed += [complete] * (complete.missing == 0)
            return
        with torch.no_grad():
            for unit in self.units:
                if not unit.is_started:
                    if unit.missing > 0:
                        return
                    unit.reduce()

    def _order(self) -> None:
        """After the first overlapped pass: the order of the units that rank 0 saw, on all ranks."""
        first = {id(unit): i for i, unit in enumerate(self.completed)}
        numbers = sorted(range(len(self.units)), key=lambda i: first.get(id(self.units[i]), len(first)))
        order = torch.tensor(numbers, device=self.units[0].params[0].device)
        dist.broadcast(order, src=0)
        self.units = [self.units[i] for i in order.tolist()]
        self.is_ordered = True

    # These two replace torch's own, which would import torch._dynamo: 1.6 s on a 2-core CPU.
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "units"):
            raise ValueError("give MuonAdamW all groups at once; its state is laid out when it is made")
        self.param_groups.append(prepared(param_group, len(self.param_groups), KINDS))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in (p for unit in self.units for p in unit.params):
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    @torch.no_grad()
    def reduce(self, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Average gradients over ranks, times `scale`; their global norm, 0-dim, the same on every rank.

        Consumes p.grad: alone, `scale` is applied to it in place.
        """
        self.finish()
        for unit in self.units:
            if not unit.is_started:
                unit.reduce()
        if self.is_overlapping and not self.is_ordered:
            self._order()
        self.is_overlapping = False
        factor = scale / self.ranks.size
        sum_sq = self.units[0].params[0].new_zeros(())
        for unit in self.units:
            grads = unit.arrive()
            if grads and (isinstance(factor, torch.Tensor) or factor != 1.0):
                torch._foreach_mul_(grads, factor)
            if grads and (unit.is_sharded or self.ranks.rank == 0):
                sum_sq += torch.stack(torch._foreach_norm(grads)).square_().sum()
        if self.ranks.size > 1:
            self.ranks.all_reduce(sum_sq).wait()
        self.is_reduced = True
        return sum_sq.sqrt_()

    @torch.no_grad()
    def update(self) -> None:
        """Step with the gradients of the last `reduce`, then share the new weights; see gathers.overlap."""
        if not self.is_reduced:
            raise ValueError("update() needs reduced gradients; call reduce() before every update()")
        self.is_reduced = False
        for unit in self.units if self.order_of_use is None else sorted(self.units, key=self.order_of_use):
            unit.update()
            unit.gather()
        if self.order_of_use is None:
            self.finish()

    def finish(self) -> None:
        """Have all weights complete; before they are read otherwise than by the model's forward pass."""
        for unit in self.units:
            unit.finish()

    def step(self, closure: Callable[[], Any] | None = None) -> torch.Tensor:  # type: ignore[override]
        """reduce(), then update() where the norm is finite on every rank; returns the norm."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        norm = self.reduce()
        if torch.isfinite(norm):
            self.update()
        return norm

    def state_arrays(self) -> dict[str, np.ndarray]:
        """This rank's state, copied: "moment|name" for whole tensors, "moment|name|offset|RxC" for slices."""
        arrays = {}
        for s in (s for unit in self.units for s in unit.slices()):
            if s.tensor.numel() == 0 or (s.is_replica and self.ranks.rank > 0):
                continue
            array = s.tensor.cpu().numpy().copy()
            if array.size == math.prod(s.shape):
                arrays[s.key] = array.reshape(s.shape)
            else:
                arrays[f"{s.key}|{s.offset}|{'x'.join(map(str, s.shape))}"] = array
        return arrays

    @torch.no_grad()
    def load_state_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take the state_arrays of all ranks of any world size, merged.

        ValueError names what is missing, unexpected or of another shape; nothing is loaded then.
        """
        slices = [s for unit in self.units for s in unit.slices()]
        shapes = {s.key: s.shape for s in slices}
        found: dict[str, list[tuple[int, np.ndarray]]] = {key: [] for key in shapes}
        problems = []
        for name, array in arrays.items():
            key, offset, shape = parse(name, array)
            if key not in found:
                problems.append(f"{key} is unexpected")
            elif shape != shapes[key]:
                problems.append(f"{key} has shape {shape}, the model needs {shapes[key]}")
            else:
                found[key].append((offset, array.reshape(-1)))
        for key, pieces in found.items():
            pieces.sort(key=lambda piece: piece[0])
            ends = [0, *(offset + piece.size for offset, piece in pieces)]
            if [offset for offset, _ in pieces] != ends[:-1] or ends[-1] != math.prod(shapes[key]):
                at = ", ".join(f"{offset}-{offset + piece.size}" for offset, piece in pieces) or "nothing"
                problems.append(f"{key} needs elements 0-{math.prod(shapes[key])} once each, found {at}")
        if problems:
            raise ValueError(
                f"optimizer state must match the model's parameters: {'; '.join(sorted(problems))}"
            )
        for s in slices:
            whole = np.concatenate([piece for _, piece in found[s.key]])
            s.tensor.copy_(torch.from_numpy(whole[s.offset : s.offset + s.tensor.numel()]))

    def state_dict(self) -> dict[str, Any]:
        """This rank's state under parameter names, and the groups' options."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {
            "state": {k: torch.from_numpy(v) for k, v in self.state_arrays().items()},
            "param_groups": options,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of state_dict; with several ranks pass their merged "state"."""
        self.load_state_arrays({k: v.cpu().numpy() for k, v in state_dict["state"].items()})
        for group, options in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(options)
