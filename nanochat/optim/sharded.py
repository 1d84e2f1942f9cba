"""MuonAdamW and its sharding (ZeRO-2): gradients are reduced to their owners, who update and share weights.

Each unit (one shape of Muon matrices, one large AdamW tensor, or the small AdamW tensors of a group) goes
through reduce -> update -> gather. One process, gloo and NCCL share the path; alone, a unit works on the
parameters and their gradients directly and needs no buffers. Left out: overlap with the backward pass.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from nanochat.optim import adamw, muon

REPLICATED_BELOW = (
    1024  # elements: smaller AdamW tensors are all-reduced and their state is kept on every rank
)


class Slice(NamedTuple):
    """A piece of optimizer state: elements [offset, offset+len) of a flattened tensor of `shape`."""

    moment: str
    name: str
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


class MuonStack:
    """All matrices of one shape in a group, padded to ceil(n/P) per rank."""

    def __init__(self, group: dict[str, Any], names: list[str], params: list[torch.Tensor], ranks: Ranks):
        self.group, self.names, self.params, self.ranks = group, names, params, ranks
        rows, cols = params[0].shape
        chunk = -(-len(params) // ranks.size)
        self.owned = range(min(ranks.rank * chunk, len(params)), min((ranks.rank + 1) * chunk, len(params)))
        self.full = params[0].new_zeros(chunk * ranks.size, rows, cols) if ranks.size > 1 else None
        self.momentum = params[0].new_zeros(len(self.owned), rows, cols)
        self.second = params[0].new_zeros(len(self.owned), max(rows, cols))
        self.numel = len(params) * rows * cols
        self.is_sharded = True
        self.grads: list[torch.Tensor] = []
        self.work: Any = None

    def reduce(self) -> None:
        grads = [gradient(p) for p in self.params]
        if self.full is None:
            self.grads = grads
            return
        self.full[len(grads) :].zero_()
        torch._foreach_copy_(list(self.full[: len(grads)].unbind()), grads)
        self.work = self.ranks.reduce_scatter(self.full)

    def arrive(self) -> list[torch.Tensor]:
        """Wait; the gradients this rank owns, summed over ranks."""
        if self.full is not None:
            self.work.wait()
            self.grads = list(self.full[self.owned.start : self.owned.stop].unbind())
        return self.grads

    def update(self) -> None:
        weights = [self.params[i].detach() for i in self.owned]
        if weights:
            options = {key: self.group[key] for key in ("lr", "momentum", *muon.DEFAULTS)}
            muon.muon_(weights, self.grads, self.momentum, self.second, **options)
        self.grads = []
        if self.full is not None:
            torch._foreach_copy_(list(self.full[self.owned.start : self.owned.stop].unbind()), weights)
            self.work = self.ranks.all_gather(self.full)

    def finish(self) -> None:
        if self.full is not None:
            self.work.wait()
            others = [i for i in range(len(self.params)) if i not in self.owned]
            torch._foreach_copy_([self.params[i].detach() for i in others], [self.full[i] for i in others])

    def slices(self) -> Iterator[Slice]:
        shape, vector = tuple(self.params[0].shape), (self.second.shape[1],)
        for i, name in enumerate(self.names):
            mine = slice(i - self.owned.start, i - self.owned.start + 1) if i in self.owned else slice(0, 0)
            yield Slice("muon.momentum", name, 0, shape, self.momentum[mine].view(-1), False)
            yield Slice("muon.second", name, 0, vector, self.second[mine].view(-1), False)


class AdamWUnit:
    """One large tensor sliced over ranks (`is_sharded`), or tensors whose state every rank keeps whole."""

    def __init__(
        self,
        group: dict[str, Any],
        names: list[str],
        params: list[torch.Tensor],
        ranks: Ranks,
        is_sharded: bool,
    ):
        self.group, self.names, self.params, self.ranks, self.is_sharded = (
            group,
            names,
            params,
            ranks,
            is_sharded,
        )
        self.numel = sum(p.numel() for p in params)
        size = ranks.size if is_sharded else 1
        chunk = -(-self.numel // size)
        rank = ranks.rank if is_sharded else 0
        self.start, self.stop = min(rank * chunk, self.numel), min((rank + 1) * chunk, self.numel)
        self.full = params[0].new_zeros(chunk * size) if ranks.size > 1 else None
        self.exp_avgs = [torch.zeros_like(p) for p in self.targets()]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.targets()]
        self.steps = [p.new_zeros(()) for p in params]
        self.grads: list[torch.Tensor] = []
        self.work: Any = None

    def targets(self) -> list[torch.Tensor]:
        """The flat pieces of the parameters that this rank updates."""
        flat = [p.detach().view(-1) for p in self.params]
        return [flat[0][self.start : self.stop]] if self.is_sharded else flat

    def reduce(self) -> None:
        grads = [gradient(p).reshape(-1) for p in self.params]
        if self.full is None:
            self.grads = grads
            return
        self.full[self.numel :].zero_()
        torch._foreach_copy_(list(self.full[: self.numel].split([g.numel() for g in grads])), grads)
        self.work = (
            self.ranks.reduce_scatter(self.full) if self.is_sharded else self.ranks.all_reduce(self.full)
        )

    def arrive(self) -> list[torch.Tensor]:
        """Wait; the gradients of `targets()`, summed over ranks."""
        if self.full is not None:
            self.work.wait()
            self.grads = list(self.full[self.start : self.stop].split([p.numel() for p in self.targets()]))
        return self.grads

    def update(self) -> None:
        targets = self.targets()
        options = {key: self.group[key] for key in ("lr", *adamw.DEFAULTS)}
        adamw.adamw_(targets, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **options)
        self.grads = []
        if self.full is not None and self.is_sharded:
            self.full[self.start : self.stop].copy_(targets[0])
            self.work = self.ranks.all_gather(self.full)

    def finish(self) -> None:
        if self.full is not None and self.is_sharded:
            self.work.wait()
            self.params[0].detach().view(-1).copy_(self.full[: self.numel])

    def slices(self) -> Iterator[Slice]:
        whole = not self.is_sharded
        for name, p, m, v, step in zip(
            self.names, self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, strict=True
        ):
            yield Slice("adamw.exp_avg", name, self.start, tuple(p.shape), m, whole)
            yield Slice("adamw.exp_avg_sq", name, self.start, tuple(p.shape), v, whole)
            yield Slice("adamw.step", name, 0, (1,), step.view(1), True)


def gradient(p: torch.Tensor) -> torch.Tensor:
    """p.grad, or zeros: a parameter unused on one rank must still take part in the collective."""
    return torch.zeros_like(p) if p.grad is None else p.grad


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, for one process or for the default process group.

    Groups are dicts with kind ("muon" | "adamw"), params (tensors or (name, tensor) pairs), lr, and
    optionally weight_decay; betas, eps (adamw); momentum, beta2, ns_steps, ns_dtype (muon). Parameters are
    contiguous fp32; Muon's are matrices. Every rank must build the same groups in the same order.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]]):
        super().__init__([prepared(group, index) for index, group in enumerate(param_groups)], {})
        names = [name for group in self.param_groups for name in group["param_names"]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"parameter names must be unique, found more than once: {', '.join(twice)}")
        self.ranks = Ranks(self.param_groups[0]["params"][0].device)
        units = [unit for group in self.param_groups for unit in build_units(group, self.ranks)]
        self.units = sorted(
            units, key=lambda unit: -unit.numel
        )  # largest first: longest transfers start first
        self.is_reduced = False

    @torch.no_grad()
    def reduce(self, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Average gradients over ranks, times `scale`; their global norm, 0-dim, the same on every rank.

        Consumes p.grad: alone, `scale` is applied to it in place.
        """
        for unit in self.units:
            unit.reduce()
        factor = scale / self.ranks.size
        sum_sq = self.units[0].params[0].new_zeros(())
        for unit in self.units:
            grads = unit.arrive()
            if isinstance(factor, torch.Tensor) or factor != 1.0:
                torch._foreach_mul_(grads, factor)
            if grads and (unit.is_sharded or self.ranks.rank == 0):
                sum_sq += torch.stack(torch._foreach_norm(grads)).square_().sum()
        if self.ranks.size > 1:
            self.ranks.all_reduce(sum_sq).wait()
        self.is_reduced = True
        return sum_sq.sqrt_()

    @torch.no_grad()
    def update(self) -> None:
        """Step with the gradients of the last `reduce`, then share the new weights."""
        if not self.is_reduced:
            raise ValueError(
                "update() must follow a reduce(), which has not been called since the last update"
            )
        self.is_reduced = False
        for unit in self.units:
            unit.update()
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
            if array.size == np.prod(s.shape):
                arrays[f"{s.moment}|{s.name}"] = array.reshape(s.shape)
            else:
                arrays[f"{s.moment}|{s.name}|{s.offset}|{'x'.join(map(str, s.shape))}"] = array
        return arrays

    @torch.no_grad()
    def load_state_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take the state_arrays of all ranks of any world size, merged. ValueError names what does not fit;
        nothing is loaded then."""
        pieces: dict[str, list[tuple[int, tuple[int, ...], np.ndarray]]] = {}
        for key, array in arrays.items():
            moment, name, *where = key.split("|")
            offset, shape = (int(where[0]), shape_of(where[1])) if where else (0, array.shape)
            pieces.setdefault(f"{moment}|{name}", []).append((offset, shape, array))
        slices = [s for unit in self.units for s in unit.slices()]
        wanted = {f"{s.moment}|{s.name}": s.shape for s in slices}
        problems = [f"missing {key}" for key in wanted if key not in pieces]
        problems += [f"unexpected {key}" for key in pieces if key not in wanted]
        for key in wanted.keys() & pieces.keys():
            parts = sorted(pieces[key], key=lambda part: part[0])
            end = 0
            for offset, shape, array in parts:
                if shape != wanted[key]:
                    problems.append(f"{key} has shape {shape}, the parameter needs {wanted[key]}")
                if offset != end:
                    problems.append(f"{key} has {array.size} elements at {offset}, expected a slice at {end}")
                end = offset + array.size
            if end != np.prod(wanted[key]):
                problems.append(f"{key} covers {end} of {np.prod(wanted[key])} elements")
        if problems:
            raise ValueError(f"optimizer state does not fit the model: {'; '.join(sorted(problems))}")
        for s in slices:
            parts = sorted(pieces[f"{s.moment}|{s.name}"], key=lambda part: part[0])
            whole = np.concatenate([array.reshape(-1) for _, _, array in parts])
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


def prepared(group: dict[str, Any], index: int) -> dict[str, Any]:
    """The group with defaults, named parameters and initial values; ValueError when it cannot work."""
    defaults = {"muon": muon.DEFAULTS, "adamw": adamw.DEFAULTS}.get(group.get("kind", ""))
    if defaults is None:
        raise ValueError(f'group {index}: kind must be "muon" or "adamw", got {group.get("kind")!r}')
    if "lr" not in group:
        raise ValueError(f"group {index}: lr is missing")
    given = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    pairs = [pair if isinstance(pair, tuple) else (f"{index}/{i}", pair) for i, pair in enumerate(given)]
    if not pairs:
        raise ValueError(f"group {index}: no parameters; leave the group out")
    for name, p in pairs:
        if p.dtype != torch.float32 or not p.is_contiguous():
            raise ValueError(
                f"{name}: weights must be contiguous float32, got {p.dtype}, strides {p.stride()}"
            )
        if group["kind"] == "muon" and p.ndim != 2:
            raise ValueError(f"{name}: Muon needs matrices, got shape {tuple(p.shape)}; use an adamw group")
    group = {**defaults, **group, "params": pairs}
    group.setdefault("initial_lr", group["lr"])
    group.setdefault("initial_weight_decay", group["weight_decay"])
    if group["kind"] == "muon" and group["ns_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"group {index}: ns_dtype must be float32 or bfloat16, got {group['ns_dtype']}")
    if group["kind"] == "muon" and not 1 <= group["ns_steps"] <= len(muon.POLAR_EXPRESS):
        raise ValueError(
            f"group {index}: ns_steps must be 1 to {len(muon.POLAR_EXPRESS)}, got {group['ns_steps']}"
        )
    return group


def build_units(group: dict[str, Any], ranks: Ranks) -> list[MuonStack | AdamWUnit]:
    named = list(zip(group["param_names"], group["params"], strict=True))
    buckets: dict[Any, list[tuple[str, torch.Tensor]]] = {}
    for name, p in named:
        is_whole = ranks.size == 1 or p.numel() < REPLICATED_BELOW
        key = p.shape if group["kind"] == "muon" else "whole" if is_whole else name
        buckets.setdefault(key, []).append((name, p))
    units: list[MuonStack | AdamWUnit] = []
    for key, pairs in buckets.items():
        names, params = [name for name, _ in pairs], [p for _, p in pairs]
        if group["kind"] == "muon":
            units.append(MuonStack(group, names, params, ranks))
        else:
            units.append(AdamWUnit(group, names, params, ranks, is_sharded=key != "whole"))
    return units


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x") if part)
