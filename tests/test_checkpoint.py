"""Checkpoints: what is saved comes back, whatever happens in between (reliability: R1 to R4, R10)."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoint_faults import FaultyOS, content, load, power_cuts, save, storage_os
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import checkpoint, storage
from nanochat.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ckpt"


def put(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(root, step, {"model": content(step)}, {"step": step}, meta={})


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# -- what is saved comes back ----------------------------------------------------------------------


def test_round_trip(root: Path) -> None:
    state = {"step": 7, "loss": 0.1 + 0.2, "tiny": 5e-324, "text": "é\u2028", "deep": [{"a": [None, True]}]}
    files = {"model": {"w": np.arange(6.0).reshape(2, 3).T, "empty": np.zeros((0, 3), np.float32)}, "rng": {}}
    path = checkpoint.save(root, 7, files, state, meta={"depth": 4})
    assert path == root / "step-00000007"
    found = checkpoint.load(root, repair=False)
    assert found is not None and (found.step, found.state, found.meta) == (7, state, {"depth": 4})
    tensors = found.tensors("model")
    assert tensors["w"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert tensors["empty"].shape == (0, 3) and found.tensors("rng") == found.tensors("nothing") == {}
    assert sorted(p.name for p in root.iterdir()) == [".lock", "step-00000007"]


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
dtypes = st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"])


@settings(max_examples=20)
@given(st.dictionaries(names, st.tuples(dtypes, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9))))
def test_any_arrays_round_trip(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, Any]) -> None:
    root = tmp_path_factory.mktemp("any")
    arrays = {}
    for name, (dtype, shape, seed) in shapes.items():
        data = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        arrays[name] = np.frombuffer(data, np.uint8 if dtype == "?" else dtype).reshape(shape).T
        arrays[name] = arrays[name] > 127 if dtype == "?" else arrays[name]
    checkpoint.save(root, 0, {"x": arrays}, {}, meta={})
    found = checkpoint.load(root, repair=False)
    assert found is not None
    back = found.tensors("x")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes() and back[name].flags.writeable


def test_nothing_yet(root: Path) -> None:
    assert checkpoint.load(root, repair=True) is None and checkpoint.list_steps(root) == []
    assert not root.exists()


@pytest.mark.parametrize(
    ("files", "state"),
    [({"a/b": {}}, {}), ({}, {"x": float("nan")}), ({}, {"x": {1, 2}}), ({"m": {"o": np.array([None])}}, {})],
)
def test_what_cannot_be_stored_is_refused(root: Path, files: dict, state: dict) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        checkpoint.save(root, 1, files, state, meta={})
    assert [p.name for p in root.iterdir()] == [".lock"]


def test_a_valid_step_is_never_overwritten(root: Path) -> None:
    put(root, 1)
    before = snapshot(root)
    put(root, 1)  # the same once more: a run that was stopped right after its save
    with pytest.raises(UserError, match="holds other values"):
        checkpoint.save(root, 1, {"model": content(2)}, {"step": 1}, meta={})
    assert snapshot(root) == before


def test_only_what_is_wanted_is_read(root: Path) -> None:
    checkpoint.save(root, 1, {"model": content(1), "optim-0": {"m": np.ones(9)}}, {"s": 1}, meta={})
    (root / "step-00000001/optim-0.safetensors").write_bytes(b"")
    found = checkpoint.load(root, repair=False, only="model")
    assert found is not None and found.state == {"s": 1} and found.tensors("optim") == {}
    assert np.array_equal(found.tensors("model")["w"], content(1)["w"])


# -- several ranks ---------------------------------------------------------------------------------


def on_ranks(world_size: int, act: Any) -> list[Any]:
    """`act(rank, gather)` in one thread a rank, with a gather that meets at a barrier; what each returned."""
    slots: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=20)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            everything = list(slots)
            barrier.wait()
            return everything

        try:
            results[rank] = act(rank, gather)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_writes_its_part(root: Path) -> None:
    def act(rank: int, gather: Any) -> Path:
        files = {f"optim-{rank}": {f"m{rank}": np.full(3, rank)}}
        if rank == 0:
            files["model"] = content(4)
        return checkpoint.save(root, 4, files, {"of": rank}, meta={}, rank=rank, world_size=3, gather=gather)

    assert on_ranks(3, act) == [root / "step-00000004"] * 3
    found = checkpoint.load(root, repair=False)
    assert found is not None and found.world_size == 3 and found.state == {"of": 0}
    assert {k: v.tolist() for k, v in found.tensors("optim-").items()} == {
        "m0": [0] * 3, "m1": [1] * 3, "m2": [2] * 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(28, "full"), checkpoint.SaveFailed), (ValueError("x"), ValueError)]
)
def test_a_rank_that_fails_fails_all(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type
) -> None:
    put(root, 1)
    write = storage.write_file

    def failing(path: Path, data: bytes) -> dict[str, Any]:
        if path.name == "optim-1.safetensors":
            raise error
        return write(path, data)

    monkeypatch.setattr(storage, "write_file", failing)

    def act(rank: int, gather: Any) -> Path:
        files = {f"optim-{rank}": {f"m{rank}": np.ones(3)}}
        return checkpoint.save(root, 2, files, {}, meta={}, rank=rank, world_size=2, gather=gather)

    assert [type(result) for result in on_ranks(2, act)] == [expected] * 2
    assert load(root) == 1 and sorted(p.name for p in root.iterdir()) == [".lock", "step-00000001"]


def test_two_ranks_cannot_write_one_file(root: Path) -> None:
    def act(rank: int, gather: Any) -> Path:
        return checkpoint.save(
            root, 2, {f"a{rank // 2}": {}}, {}, meta={}, rank=rank, world_size=2, gather=gather
        )

    assert {type(result) for result in on_ranks(2, act)} <= {ValueError, checkpoint.SaveFailed}
    assert checkpoint.list_steps(root) == []


# -- damage (R4) -----------------------------------------------------------------------------------


def damage(path: Path, how: str, rng: random.Random, other: Path) -> None:
    """Change one file of a checkpoint for the worse."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "zero":
        data[at] ^= 0xFF  # so that the page cannot have been zero already
        data[at & ~4095 : (at & ~4095) + 4096] = bytes(min(4096, len(data) - (at & ~4095)))
    elif how == "truncate":
        del data[at:]
    elif how == "append":
        data += b"\0"
    if how == "remove":
        path.unlink()
    elif how == "swap":
        path.write_bytes((other / path.name).read_bytes())
    elif how == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(data)


def damages(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    rng = random.Random(count)
    clean = tmp_path / "clean"
    put(clean, 1, 2)
    for i in range(count):
        root = tmp_path / "damaged"
        shutil.copytree(clean, root)
        hows = ("flip", "zero", "truncate", "append", "remove", "swap", "directory")
        how = hows[i % 7]
        victim = rng.choice(["model.safetensors", "state.json", "manifest.json"])
        damage(root / "step-00000002" / victim, how, rng, root / "step-00000001")
        assert load(root) == 1, (how, victim)
        said = capsys.readouterr().err
        assert victim in said and "corrupt-step-00000002" in said, (how, victim, said)
        assert checkpoint.list_steps(root) == [1] and len(list(root.glob("corrupt-step-00000002-*"))) == 1
        shutil.rmtree(root)


def test_damage_is_found_named_and_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages(tmp_path, capsys, 154)


@pytest.mark.campaign
def test_damage_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damages(tmp_path, capsys, 1540)


def test_an_unverified_reader_takes_flips_for_weights(root: Path) -> None:
    """The control: without our hashes, nearly every flip would be loaded."""
    put(root, 1)
    path, rng, silent = root / "step-00000001/model.safetensors", random.Random(0), 0
    intact = path.read_bytes()
    for _ in range(20):
        damage(path, "flip", rng, root)
        try:
            checkpoint._read_tensors(path)
            silent += 1
        except storage.Damaged:
            pass
        path.write_bytes(intact)
    assert silent >= 15


def test_swapped_directories_are_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, 1, 2)
    (root / "step-00000002").rename(root / "step-00000003")
    assert load(root) == 1
    assert "belongs to step 2" in capsys.readouterr().err


def test_chat_renames_nothing(root: Path) -> None:
    put(root, 1, 2)
    (root / "step-00000002/model.safetensors").write_bytes(b"")
    before = snapshot(root)
    found = checkpoint.load(root, repair=False)
    assert found is not None and found.step == 1 and snapshot(root) == before


def test_no_good_step_is_an_error_and_stays_one(root: Path) -> None:
    put(root, 1, 2)
    for step in ("step-00000001", "step-00000002"):
        (root / step / "manifest.json").write_text("{}")
    for _ in range(2):  # the second time there are only corrupt-* left
        with pytest.raises(UserError, match=r"step 2|only damaged"):
            checkpoint.load(root, repair=True)


def test_a_read_error_falls_back_without_renaming(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, 1, 2)
    verify = storage.verify_file

    def failing(path: Path, record: Any) -> None:
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, "Input/output error", str(path))
        verify(path, record)

    monkeypatch.setattr(storage, "verify_file", failing)
    assert load(root) == 1 and checkpoint.list_steps(root) == [1, 2]


def test_explicit_step(root: Path) -> None:
    put(root, 1, 2, 3)
    with pytest.raises(UserError, match=r"only \[1, 2, 3\]"):
        checkpoint.load(root, 4, repair=True)
    found = checkpoint.load(root, 2, repair=False)
    assert found is not None and found.step == 2 and checkpoint.list_steps(root) == [1, 2, 3]
    checkpoint.load(root, 2, repair=True)  # training goes on from 2: the old 3 must never be resumed
    assert load(root) == 2 and len(list(root.glob("aside-step-00000003-*"))) == 1
    (root / "step-00000002/state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.load(root, 2, repair=True)
    assert checkpoint.list_steps(root) == [1, 2]


# -- retention -------------------------------------------------------------------------------------


def test_prune_keeps_the_newest_the_best_and_the_protected(root: Path) -> None:
    put(root, *range(1, 9))
    assert checkpoint.mark_best(root, 3, 0.5) and not checkpoint.mark_best(root, 4, 0.6)
    assert checkpoint.best_of(root) == (3, 0.5)
    assert checkpoint.prune(root, keep=2, protect=[1, 99]) == [2, 4, 5, 6]
    assert checkpoint.list_steps(root) == [1, 3, 7, 8]
    assert not list(root.glob("trash-*"))


def test_prune_counts_only_good_steps(root: Path) -> None:
    put(root, 1, 2, 3, 4)
    (root / "step-00000004/model.safetensors").write_bytes(b"")
    (root / "step-00000003/manifest.json").unlink()
    assert checkpoint.prune(root, keep=2) == []
    with pytest.raises(ValueError, match="at least 2"):
        checkpoint.prune(root, keep=1)


def test_a_damaged_record_of_the_best_stops_deleting(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, 1, 2, 3, 4)
    checkpoint.mark_best(root, 1, 0.5)
    text = (root / "best.json").read_text()
    (root / "best.json").write_text(text.replace('"step":1', '"step":2'))
    assert checkpoint.prune(root) == [] and "best.json" in capsys.readouterr().err
    assert checkpoint.mark_best(root, 4, 0.9) and checkpoint.prune(root) == [1, 2]


def test_leftovers_are_deleted_unless_somebody_writes(root: Path) -> None:
    put(root, 1)
    (root / "tmp-2-aa").mkdir()
    (root / "tmp-2-aa/model.safetensors").write_bytes(b"half")
    (root / "trash-1-bb").mkdir()
    with storage.lock(root / checkpoint.LOCK) as held:
        assert held and load(root) == 1 and (root / "tmp-2-aa").exists()
    assert load(root) == 1
    assert sorted(p.name for p in root.iterdir()) == [".lock", "step-00000001"]


def test_one_writer_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, 1)
    monkeypatch.setattr(checkpoint, "LOCK_WAIT_SECONDS", 0.1)
    with storage.lock(root / checkpoint.LOCK), pytest.raises(checkpoint.SaveFailed, match="another process"):
        put(root, 2)
    put(root, 2)


def test_too_little_space_is_seen_before_writing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, 1)
    monkeypatch.setattr(checkpoint, "SPACE_RESERVE_BYTES", 1 << 60)
    with pytest.raises(checkpoint.SaveFailed, match="must be free"):
        put(root, 2)
    assert sorted(p.name for p in root.iterdir()) == [".lock", "step-00000001"]


# -- a fault at every system call (R2, R10) --------------------------------------------------------


def every_call(tmp_path: Path) -> tuple[Path, int]:
    """A directory with three saved steps, and how many calls the fourth makes on the disk."""
    clean = tmp_path / "clean"
    for step in (1, 2, 3):
        save(clean, step)
    shutil.copytree(clean, tmp_path / "count")
    with storage_os(FaultyOS()) as counting:
        save(tmp_path / "count", 4)
    assert counting.calls > 25
    return clean, counting.calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("again", [False, True])
def test_an_error_at_every_call(tmp_path: Path, code: int, again: bool) -> None:
    """Once, or from then on: training continues, the last good step is there, the next save works."""
    clean, calls = every_call(tmp_path)
    failed = 0
    for fail_at in range(calls):
        root = tmp_path / "faulty"
        shutil.copytree(clean, root)
        with storage_os(FaultyOS(fail_at, code, again)):
            try:
                save(root, 4)
                saved = True
            except checkpoint.SaveFailed:
                saved, failed = False, failed + 1
        # a rename that could not be synced is taken back, unless that fails too: then 4 is there, and whole
        assert load(root) in ([4] if saved else [3, 4] if again else [3]), fail_at
        save(root, 5)
        assert load(root) == 5 and not list(root.glob("tmp-*")) and not list(root.glob("corrupt-*"))
        shutil.rmtree(root)
    assert failed > calls / 3


def test_death_at_every_call(tmp_path: Path) -> None:
    """The process ends before each call in turn (in a thread-free child; R2's kill)."""
    program = (
        "import os, shutil, sys; from pathlib import Path; from helpers.checkpoint_faults import *\n"
        "clean, base, calls = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "for fail_at in range(calls):\n"
        "    root = base / str(fail_at); shutil.copytree(clean, root)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        with storage_os(FaultyOS(fail_at)): save(root, 4)\n"
        "        os._exit(0)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9\n"
        "    at = load(root); assert at in (3, 4), (fail_at, at)\n"
        "    save(root, at + 1); assert load(root) == at + 1\n"
        "    assert not list(root.glob('t*-*')), fail_at\n"
        "    print(at, end=' ')\n"
    )
    clean, calls = every_call(tmp_path)
    steps = child_process("-c", program, str(clean), str(tmp_path), str(calls)).split()
    assert len(steps) == calls and {"3", "4"} == set(steps)


def child_process(*arguments: str) -> str:
    """What a Python process without pytest and torch prints."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- kill -9 at random (R1) and power cuts (R3) ----------------------------------------------------


def kills(count: int, what: str = "kills") -> dict[str, int]:
    return json.loads(
        child_process(
            str(Path(__file__).with_name("helpers") / "checkpoint_faults.py"), what, "--count", str(count)
        )
    )


def test_kill_at_any_moment() -> None:
    outcome = kills(100)
    assert outcome["kills"] == 100 and outcome["inside"] >= 30
    assert outcome["lost"] == outcome["broken"] == 0 and outcome["steps"] > 25


def test_kill_breaks_a_writer_in_place() -> None:
    """The control: the same harness must catch a naive writer."""
    assert kills(20, "kills-control")["broken"] > 0


@pytest.mark.campaign
def test_kill_campaign() -> None:
    outcome = kills(2000)
    assert outcome["inside"] >= 600 and outcome["lost"] == outcome["broken"] == 0


def test_power_cut_after_any_operation(tmp_path: Path) -> None:
    outcome = power_cuts(tmp_path / "power", num_steps=4, states_per_cut=4, seed=1)
    assert outcome["cuts"] > 80 and outcome["lost"] == outcome["broken"] == 0


def test_power_cut_shows_a_disk_that_does_not_sync(tmp_path: Path) -> None:
    """The control: without syncs, acknowledged steps are lost."""
    outcome = power_cuts(tmp_path / "power", num_steps=4, states_per_cut=4, seed=1, lying=True)
    assert outcome["lost"] + outcome["broken"] > 20


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(4))
def test_power_cut_campaign(tmp_path: Path, seed: int) -> None:
    outcome = power_cuts(tmp_path / "power", num_steps=8, states_per_cut=30, seed=seed)
    assert outcome["lost"] == outcome["broken"] == 0
