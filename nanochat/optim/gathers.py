"""Gathers that run under the next forward pass: each module waits for its own weights before its use.

    gathers.overlap(optimizer, model)     # several ranks; nothing to do for one process

After `update()` the new weights are on their way, in order of use. stages() says who uses what; a pre-hook of
each module ends the transfers that it needs, and state_dict() ends all. Whoever reads weights otherwise calls
optimizer.finish() first. Compiled layers are not supported: a hook would break their graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat.optim.sharded import MuonAdamW, Unit


def unsupported_reason(model: Any) -> str | None:
    """Why gathers of this model cannot wait, or None."""
    is_compiled = any(getattr(block, "_compiled_call_impl", None) is not None for block in model.blocks)
    return "a wait inside a compiled layer would break its graph" if is_compiled else None


def stages(model: Any) -> list[tuple[Any, list[Any]]]:
    """(module, parameters that must be complete when it is called) of a GPT, in order of use."""
    found: list[tuple[Any, list[Any]]] = [(model.wte, [model.wte.weight])]
    for i, block in enumerate(model.blocks):
        if str(i) in model.value_embeds:
            found.append((model.value_embeds[str(i)], [model.value_embeds[str(i)].weight]))
        found.append((block, list(block.parameters())))
    found[-1][1].append(model.lm_head.weight)  # the loss takes it without calling the module
    named = {id(p) for _, params in found for p in params}
    found[0][1].extend(p for p in model.parameters() if id(p) not in named)  # scalars, and other inputs
    return found


def overlap(optimizer: MuonAdamW, model: Any) -> Callable[[], None]:
    """Let gathers of `optimizer` run on until their weights are used; returns what ends that, transfers
    included.

    ValueError for a sharded parameter that no stage names: it would be used before it has arrived.
    """
    place = {id(p): i for i, (_, params) in enumerate(stages(model)) for p in params}
    first: dict[int, list[Unit]] = {}
    order: dict[int, int] = {}
    for unit in optimizer.units:
        if unit.is_sharded:
            unknown = [n for n, p in zip(unit.names, unit.params, strict=True) if id(p) not in place]
            if unknown:
                raise ValueError(f"no stage uses {', '.join(unknown)}")
            order[id(unit)] = min(place[id(p)] for p in unit.params)
            first.setdefault(order[id(unit)], []).append(unit)

    def waits_for(units: list[Unit]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for unit in units:
                unit.finish()

        return hook

    hooks = [
        module.register_forward_pre_hook(waits_for(first[i]))
        for i, (module, _) in enumerate(stages(model))
        if i in first
    ]
    hooks.append(model.register_state_dict_pre_hook(lambda *_: optimizer.finish()))
    optimizer.order_of_use = lambda unit: order.get(id(unit), 0)

    def end() -> None:
        optimizer.finish()
        optimizer.order_of_use = None
        for each in hooks:
            each.remove()

    return end
