"""MuonAdamW on 2, 3 and 4 gloo processes against one process on averaged gradients; state across world sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.optim import MuonAdamW
from nanochat.optim.groups import param_groups

SHAPES = {  # value_embeds has 1,147 elements and every stack a length that 2 or 3 ranks do not divide
    "transformer.wte.weight": (40, 32),
    **{f"transformer.h.{i}.attn.c_q.weight": (32, 32) for i in range(4)},
    "transformer.h.0.attn.ve_gate.weight": (2, 12),
    "transformer.h.0.mlp.c_fc.weight": (64, 16),
    "value_embeds.1.weight": (37, 31),
    "lm_head.weight": (40, 32),
    "resid_lambdas": (4,),
    "x0_lambdas": (4,),
    "smear_lambda": (1,),
}
STEPS = 3
UNUSED = "value_embeds.1.weight"  # has no gradient on any rank in step 1
PARTLY_USED = ("lm_head.weight", "transformer.h.2.attn.c_q.weight", "x0_lambdas")  # none on rank 0 in step 2


def make(seed: int = 0) -> tuple[dict[str, torch.nn.Parameter], MuonAdamW]:
    gen = torch.Generator().manual_seed(seed)
    params = {n: torch.nn.Parameter(0.1 * torch.randn(shape, generator=gen)) for n, shape in SHAPES.items()}
    # No decay on matrices: its on/off mask would turn rounding near zero into a difference.
    groups = param_groups(params.items(), model_dim=32, batch_tokens=2**12, weight_decay=0.0)
    return params, MuonAdamW(groups)


def make_grads(step: int, rank: int) -> dict[str, torch.Tensor | None]:
    gen = torch.Generator().manual_seed(100 * step + rank)
    grads: dict[str, torch.Tensor | None] = {n: torch.randn(s, generator=gen) for n, s in SHAPES.items()}
    for name in (UNUSED,) if step == 1 else PARTLY_USED if (step, rank) == (2, 0) else ():
        grads[name] = None
    return grads


def set_grads(params: dict[str, torch.nn.Parameter], grads: dict[str, torch.Tensor | None]) -> None:
    for name, p in params.items():
        p.grad = grads[name]


def numpy_of(params: dict[str, torch.nn.Parameter]) -> dict[str, np.ndarray]:
    return {f"weight|{name}": p.detach().numpy().copy() for name, p in params.items()}


def child(rank: int, folder: Path) -> None:
    """Be a rank of 2, then of 3 and 4: the processes are shared because importing torch is what takes time."""
    torch.set_num_threads(1)
    for size in (2, 3, 4):
        if rank < size:
            init = f"file://{folder}/store-{size}"
            dist.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
            run_rank(rank, size, folder / str(size), merged(folder / str(size - 1), "resliced", size - 1))
            dist.barrier()
            dist.destroy_process_group()


def run_rank(rank: int, size: int, folder: Path, foreign: dict[str, np.ndarray]) -> None:
    params, opt = make()
    norms = []
    for step in range(STEPS):
        set_grads(params, make_grads(step, rank))
        opt.ranks.can_scatter = opt.ranks.can_scatter and step != 2  # the all-reduce fallback, too
        opt.reduce(scale=0.5)
        norms.append(opt.reduce(scale=2.0).item())  # reducing again starts from p.grad
        opt.update()
    state = opt.state_arrays()
    np.savez(folder / f"trained-{rank}.npz", **numpy_of(params), norms=norms)
    np.savez(folder / f"state-{rank}.npz", **state)

    overlapped(rank, size, folder)

    weights = numpy_of(params)
    grads = make_grads(7, rank)
    if rank == size - 1:
        grads["lm_head.weight"][3, 3] = float("inf")
    set_grads(params, grads)
    assert not torch.isfinite(opt.step())
    assert all(np.array_equal(array, weights[key]) for key, array in numpy_of(params).items())
    assert all(np.array_equal(array, state[key]) for key, array in opt.state_arrays().items())

    params, opt = make(seed=1)
    opt.load_state_arrays(foreign)
    np.savez(folder / f"resliced-{rank}.npz", **opt.state_arrays())
    set_grads(params, make_grads(9, rank))
    opt.step()
    np.savez(folder / f"continued-{rank}.npz", **numpy_of(params))


def loss_of(params: dict[str, torch.nn.Parameter], data: torch.Tensor) -> torch.Tensor:
    """Uses the parameters one after the other, so that their gradients come in the reverse order."""
    total = torch.zeros(())
    for i, p in enumerate(params.values()):
        total = (total + (p * data[i]).sin().sum()).tanh() + 0.1 * (p * data[i]).sum()
    return total


def make_data(step: int, rank: int, micro: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randn(len(SHAPES), generator=gen)


def overlapped(rank: int, size: int, folder: Path) -> None:
    """Backward passes with reductions that start inside, two micro-batches a step; rank 1 leaves a parameter out."""
    params, opt = make(seed=3)
    early = []
    for step in range(STEPS):
        for micro in range(2):
            used = {n: p for n, p in params.items() if not (step == 2 and rank == 1 and n == UNUSED)}
            data = make_data(step, rank, micro)
            if micro == 1:
                opt.overlap()
            loss_of(used, data).backward()
        early.append(sum(unit.is_started for unit in opt.units))
        opt.step()
        opt.zero_grad()
    np.savez(folder / f"overlapped-{rank}.npz", **numpy_of(params), early=early)


def merged(folder: Path, stem: str, size: int) -> dict[str, np.ndarray]:
    """The files of all ranks as one dict; no entry may be saved twice."""
    arrays: dict[str, np.ndarray] = {}
    for rank in range(size):
        with np.load(folder / f"{stem}-{rank}.npz") as file:
            assert not arrays.keys() & set(file.files)
            arrays |= dict(file)
    return arrays


def train_alone(size: int) -> tuple[dict[str, torch.nn.Parameter], MuonAdamW, list[float]]:
    params, opt = make()
    norms = []
    for step in range(STEPS):
        set_grads(params, averaged(step, size))
        norms.append(opt.reduce(scale=2.0).item())
        opt.update()
    return params, opt, norms


def averaged(step: int, size: int) -> dict[str, torch.Tensor | None]:
    each = [make_grads(step, rank) for rank in range(size)]
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return {name: sum(zeros[name] if g[name] is None else g[name] for g in each) / size for name in SHAPES}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(a) - b) / max(np.linalg.norm(np.float64(b)), 1e-30))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Results of both world sizes; 2 ranks continue from the state of one process, 3 from that of the 2, 4 from that of the 3."""
    root = tmp_path_factory.mktemp("ranks")
    for size in (1, 2, 3, 4):
        (root / str(size)).mkdir()
    np.savez(root / "1" / "resliced-0.npz", **train_alone(1)[1].state_arrays())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(child, (root,), nprocs=4)
    return root


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_equal_one_process_on_averaged_gradients(root, size):
    params, opt, norms = train_alone(size)
    for rank in range(size):
        with np.load(root / str(size) / f"trained-{rank}.npz") as file:
            trained = dict(file)
        assert trained.pop("norms").tolist() == pytest.approx(norms, rel=1e-6)
        with np.load(root / str(size) / "trained-0.npz") as first:
            assert all(np.array_equal(array, first[key]) for key, array in trained.items())
        for key, array in numpy_of(params).items():
            assert relative(trained[key], array) < 1e-6, key
    twin = make()[1]
    twin.load_state_arrays(merged(root / str(size), "state", size))
    for key, array in opt.state_arrays().items():
        assert relative(twin.state_arrays()[key], array) < 2e-6, key


@pytest.mark.parametrize("size", [2, 3, 4])
def test_reductions_inside_the_backward_pass_change_nothing(root, size):
    """Equal to one process on averaged gradients; from the second step on they do start early."""
    params, opt = make(seed=3)
    for step in range(STEPS):
        sums = {name: torch.zeros_like(p) for name, p in params.items()}
        for rank in range(size):
            used = {n: p for n, p in params.items() if not (step == 2 and rank == 1 and n == UNUSED)}
            for micro in range(2):
                opt.zero_grad()
                loss_of(used, make_data(step, rank, micro)).backward()
                for name, p in used.items():
                    sums[name] += p.grad / size
        set_grads(params, sums)
        opt.step()
    for rank in range(size):
        with np.load(root / str(size) / f"overlapped-{rank}.npz") as file:
            early = file["early"].tolist()
            for key, array in numpy_of(params).items():
                assert relative(file[key], array) < 1e-6, key
        assert early[0] == 0 and early[1] >= 8 and 0 < early[2] <= early[1]
    assert early[2] < early[1] or rank != 1, "a missing gradient holds back what comes after it"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_state_is_sharded(root, size):
    """No rank keeps more than its share of the large tensors: ceil(n / ranks) matrices or elements."""
    whole = sum(array.size for array in merged(root / "1", "resliced", 1).values())
    with np.load(root / str(size) / "state-1.npz") as file:
        assert 0 < sum(file[key].size for key in file.files) <= 1.2 * whole / size


def test_state_goes_through_1_2_3_4_1_ranks_unchanged(root):
    one, two, three = (merged(root / str(size), "resliced", size) for size in (1, 2, 4))
    assert one.keys() != two.keys() != three.keys()
    opt = make(seed=2)[1]
    opt.load_state_arrays(three)
    back = opt.state_arrays()
    assert back.keys() == one.keys()
    assert all(np.array_equal(back[key], array) for key, array in one.items())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_foreign_state_continues_as_its_own(root, size):
    params, opt = make(seed=1)
    opt.load_state_arrays(merged(root / "1", "resliced", 1))
    set_grads(params, averaged(9, size))
    opt.step()
    with np.load(root / str(size) / f"continued-{size - 1}.npz") as file:
        for key, array in numpy_of(params).items():
            assert relative(file[key], array) < 1e-6, key


def test_a_missing_ranks_file_is_named(root):
    with np.load(root / "2" / "state-0.npz") as file, pytest.raises(ValueError, match="elements 0-1280"):
        make()[1].load_state_arrays(dict(file))
