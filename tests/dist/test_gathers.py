"""Weights that travel under the next forward pass, on 2, 3 and 4 gloo processes: bit for bit what waiting gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import gathers
from nanochat.train.speed import checkpoint_layers

CONFIG = GPTConfig(sequence_len=16, vocab_size=96, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L")
STEPS = 3
HOWS = ("waits", "overlaps", "checkpointed waits", "checkpointed overlaps")


def child(rank: int, folder: Path) -> None:
    """Be a rank of 2, then of 3 and 4."""
    torch.set_num_threads(1)
    for size in (2, 3, 4):
        if rank < size:
            init = f"file://{folder}/store-{size}"
            dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
            results = [train(rank, how) for how in HOWS]
            arrays = {f"{i}|{key}": value for i, found in enumerate(results) for key, value in found.items()}
            np.savez(folder / f"{size}-{rank}.npz", **arrays)
            dist.barrier()
            dist.destroy_process_group()


def train(rank: int, how: str) -> dict[str, np.ndarray]:
    """Steps of two micro-batches; what evaluation, state_dict and the parameters hold right after each."""
    model = GPT(CONFIG)
    model.init_weights(1)
    if "checkpointed" in how:
        checkpoint_layers(model)
    optimizer = model.setup_optimizer(batch_tokens=2**12, weight_decay=0.1)
    end = gathers.overlap(optimizer, model) if "overlaps" in how else optimizer.finish
    pending, stale, found = [], [], {}
    for step in range(STEPS):
        gen = torch.Generator().manual_seed(100 * step + rank)
        ids = torch.randint(0, 96, (2, 2, 17), generator=gen)
        model.train()
        for i, rows in enumerate(ids):
            if i == 1:
                optimizer.overlap()
            model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        pending.append(sum(unit.is_gathering for unit in optimizer.units))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if step == 1:
            found["state"] = model.state_dict()["transformer.wte.weight"].numpy().copy()
            assert not any(unit.is_gathering for unit in optimizer.units), "state_dict ends every gather"
        if step == 2:
            model.eval()
            with torch.inference_mode():
                found["eval"] = model(ids[0, :, :-1], ids[0, :, 1:]).numpy().copy()
            assert not any(unit.is_gathering for unit in optimizer.units), "so does a forward pass"
        if step > 0:
            stale.append(sum(not torch.equal(p, before[name]) for name, p in model.named_parameters()))
    end()
    assert not model.wte._forward_pre_hooks, "no hook is left behind"
    weights = {f"weight|{name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    return found | weights | {"pending": np.array(pending), "stale": np.array(stale)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gathers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(child, (root,), nprocs=4)
    return root


@pytest.mark.parametrize("size", [2, 3, 4])
def test_nothing_changes_but_the_time_of_the_wait(root, size):
    ranks = [dict(np.load(root / f"{size}-{rank}.npz")) for rank in range(size)]
    for found in ranks:
        keys = [key[2:] for key in found if key.startswith("0|") and key[2:] not in ("pending", "stale")]
        assert len(keys) > 20 and {"state", "eval"} <= set(keys)
        for key in keys:
            assert all(np.array_equal(found[f"{i}|{key}"], found[f"{i + 1}|{key}"]) for i in (0, 2)), key
            assert key == "eval" or np.array_equal(found[f"0|{key}"], ranks[0][f"0|{key}"]), key
        # the control: gathers were under way, and weights old until they ended
        for i in (0, 2):
            assert found[f"{i}|pending"].tolist() == [0] * STEPS and found[f"{i}|stale"].tolist() == [0, 0]
            assert (found[f"{i + 1}|pending"] > 5).all() and (found[f"{i + 1}|stale"] > 5).all()


def test_compiled_layers_and_unknown_parameters_are_refused():
    model = GPT(CONFIG)
    assert gathers.unsupported_reason(model) is None
    model.blocks[0].compile()
    assert "graph" in str(gathers.unsupported_reason(model))
    model.blocks[0].attn.c_q = torch.nn.Linear(32, 32, bias=False)
    named = {id(p) for _, params in gathers.stages(model) for p in params}
    missing = {name for name, p in model.named_parameters() if id(p) not in named}
    assert not missing, "every parameter has a stage"
    optimizer = model.setup_optimizer()
    optimizer.units[0].is_sharded, optimizer.units[0].names = True, ["stranger"]
    optimizer.units[0].params = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="stranger"):
        gathers.overlap(optimizer, model)
