"""Faults for checkpoint code: kill -9 at random, an error at every system call, a power cut after every one.

Used by test_checkpoint.py; `python -m tests.helpers.checkpoint_faults kills --count 2000` runs a campaign by
hand. A trial never imports torch: a child is forked in milliseconds. Contents are a function of the step, so
that whatever is loaded can be told from what was meant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from nanochat import checkpoint, storage

Save = Callable[[Path, int], None]
NUM_BYTES = 1 << 13


def content(step: int) -> dict[str, np.ndarray]:
    """The arrays a checkpoint of `step` must hold."""
    rng = np.random.default_rng(step)
    return {"w": rng.standard_normal(NUM_BYTES // 8), "n": np.array(step), "t": rng.integers(0, 9, (3, 4)).T}


def save(root: Path, step: int) -> None:
    """One step of a run, as fit does it: save, record the best now and then, prune."""
    checkpoint.save(
        root,
        step,
        {"model": content(step), "optim-0": {"m": content(-step % 97)["w"]}},
        {"step": step},
        meta={},
    )
    if step % 3 == 0:
        checkpoint.mark_best(root, step, 1.0 / step)
    checkpoint.prune(root, keep=2)


def save_in_place(root: Path, step: int) -> None:
    """The control: the same bytes written over the old ones, no manifest, no rename."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "latest.json", "w") as file:
        for part in json.dumps({"step": step, "w": content(step)["w"].tolist()}):
            file.write(part)


def load(root: Path) -> int:
    """The step that a restart would continue from (0: from nothing), its content compared bit for bit."""
    found = checkpoint.load(root, repair=True)
    if found is None:
        return 0
    assert found.state == {"step": found.step}
    tensors = found.tensors("model")
    for name, array in content(found.step).items():
        assert tensors[name].dtype == array.dtype and np.array_equal(tensors[name], array), name
    return found.step


def load_in_place(root: Path) -> int:
    path = root / "latest.json"
    if not path.exists():
        return 0
    value = json.loads(path.read_text())
    assert np.array_equal(value["w"], content(value["step"])["w"])
    return value["step"]


# -- kill -9 ---------------------------------------------------------------------------------------


def kills(
    root: Path, count: int, seed: int, step: Save = save, restart: Callable[[Path], int] = load
) -> dict[str, int]:
    """Kill a saving process `count` times, half of them while a tmp-* or trash-* exists.

    Each trial forks, resumes, saves step after step and reports every save that has returned; then it is
    killed, and the next must continue from what was reported or later. Returns counts, of which `lost` and
    `broken` must be zero.
    """
    rng = random.Random(seed)
    outcome = {"kills": 0, "inside": 0, "lost": 0, "broken": 0, "steps": 0}
    start = time.monotonic()
    for at in range(1, 5):
        step(root, at)
    save_seconds = (time.monotonic() - start) / 4
    for trial in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                at = restart(root)
                while True:
                    step(root, at := at + 1)
                    os.write(writer, at.to_bytes(4, "big"))
            finally:
                os._exit(9)
        os.close(writer)
        reported = b""
        for _ in range(rng.randrange(3)):  # whole steps first, so that the run moves on
            if select.select([reader], [], [], 5.0)[0]:
                reported += os.read(reader, 4)
        if trial % 2:  # wait for a save or a prune to be under way
            until = time.monotonic() + 0.2
            while time.monotonic() < until and not _is_busy(root):
                time.sleep(0.0002)
            time.sleep(rng.uniform(0.0, save_seconds / 2))
        else:
            time.sleep(rng.uniform(0.0, 2 * save_seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(reader, 1 << 16):
            reported += part
        os.close(reader)
        acknowledged = int.from_bytes(reported[-4:], "big") if reported else 0
        outcome["kills"] += 1
        outcome["inside"] += _is_busy(root)
        try:
            at = restart(root)
        except Exception as error:
            print(f"trial {trial}: {error}", file=sys.stderr)
            outcome["broken"] += 1
            shutil.rmtree(root, ignore_errors=True)
            continue
        outcome["lost"] += at < acknowledged
        outcome["steps"] = at
    return outcome


def _is_busy(root: Path) -> bool:
    return root.is_dir() and any(name.startswith(("tmp-", "trash-")) for name in os.listdir(root))


# -- an error at every system call -----------------------------------------------------------------


class FaultyOS:
    """Stands in for `os` in nanochat.storage: disk call `fail_at` fails with `code` (0: exit)."""

    CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")

    def __init__(self, fail_at: int | None = None, code: int = 0, again: bool = False) -> None:
        self.fail_at, self.code, self.again, self.calls = fail_at, code, again, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*args: Any) -> Any:
            number = self.calls
            self.calls += 1
            if self.fail_at is not None and (
                number == self.fail_at or (self.again and number > self.fail_at)
            ):
                if name == "write" and self.code:  # a full disk takes part of a write first
                    os.write(args[0], args[1][: len(args[1]) // 2])
                if self.code == 0:
                    os._exit(9)
                raise OSError(self.code, os.strerror(self.code))
            return None if name == "fsync" else real(*args)

        return call


@contextlib.contextmanager
def storage_os(replacement: Any) -> Iterator[Any]:
    """Give nanochat.storage another `os` for a while."""
    storage.os = replacement
    try:
        yield replacement
    finally:
        storage.os = os


# -- power cuts ------------------------------------------------------------------------------------


class RecordingOS:
    """Stands in for `os`: does everything and records what a disk would have to remember.

    The log holds ("file", inode), ("write", inode, bytes), ("sync", inode), ("dir", inode, parent, name),
    ("link", parent, name, inode), ("move", parent, old, new), ("unlink", parent, name), ("ack", step).
    """

    def __init__(self, base: Path, *, lying: bool = False) -> None:
        self.base, self.lying, self.log = base, lying, []  # type: ignore[var-annotated]
        self.inodes: dict[PurePath, int] = {base: 0}
        self.descriptors: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        descriptor = os.open(path, flags, mode)
        if path.name != checkpoint.LOCK:
            if path not in self.inodes:
                self.inodes[path] = inode = len(self.log) + 1
                self.log += [("file", inode), ("link", self.inodes[path.parent], path.name, inode)]
            self.descriptors[descriptor] = self.inodes[path]
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        self.log.append(("write", self.descriptors[descriptor], bytes(data)))
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        if not self.lying:
            self.log.append(("sync", self.descriptors[descriptor]))

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self.inodes[path] = inode = len(self.log) + 1
        self.log += [("dir", inode), ("link", self.inodes[path.parent], path.name, inode)]

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)
        for path in [path for path in self.inodes if path == old or old in path.parents]:
            self.inodes[new / path.relative_to(old)] = self.inodes.pop(path)
        self.log.append(("move", self.inodes[new.parent], old.name, new.name))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self.log.append(("unlink", self.inodes[path.parent], path.name))
        del self.inodes[path]

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)
        self.log.append(("unlink", self.inodes[path.parent], path.name))
        del self.inodes[path]


def after_power_cut(
    log: list[tuple], target: Path, keep_data: Callable[[], bool], keep_name: Callable[[], bool]
) -> None:
    """Build in `target` a state that a disk may hold after the operations of `log`.

    What was synced is there. Of the rest, each write is kept or cut short (`keep_data`), and each change of a
    directory is kept or lost (`keep_name`); a lost link hides later changes of that name.
    """
    synced: dict[int, int] = {}
    for i, entry in enumerate(log):
        if entry[0] == "sync":
            synced[entry[1]] = i
    directories: dict[int, dict[str, int]] = {0: {}}
    files: dict[int, bytes] = {}
    for i, entry in enumerate(log):
        kind, inode = entry[0], entry[1]
        durable = i < synced.get(inode, -1)
        if kind == "file":
            files[inode] = b""
        elif kind == "dir":
            directories[inode] = {}
        elif kind == "write":
            whole = durable or keep_data()
            files[inode] += entry[2] if whole else entry[2][: len(entry[2]) // 2]
        elif kind in ("link", "move", "unlink") and (durable or keep_name()):
            names = directories[inode]
            if kind == "link":
                names[entry[2]] = entry[3]
            elif kind == "unlink":
                names.pop(entry[2], None)
            elif entry[2] in names:
                names[entry[3]] = names.pop(entry[2])

    def build(inode: int, path: Path) -> None:
        path.mkdir()
        for name, child in directories[inode].items():
            build(child, path / name) if child in directories else (path / name).write_bytes(files[child])

    build(0, target)


def power_cuts(
    base: Path, num_steps: int, states_per_cut: int, seed: int, *, lying: bool = False
) -> dict[str, int]:
    """Save `num_steps` times, cut the power after every operation, load every state that the disk may be in.

    `lost`: an acknowledged save is not there; `broken`: content differs, or nothing loads. With `lying` the
    disk's sync does nothing, which has to show: the control.
    """
    rng = random.Random(seed)
    live = base / "live"
    live.mkdir(parents=True)
    with storage_os(RecordingOS(live, lying=lying)) as recorder:
        for step in range(1, num_steps + 1):
            save(live / "ckpt", step)
            recorder.log.append(("ack", -1, step))
    outcome = {"cuts": 0, "states": 0, "lost": 0, "broken": 0}
    acknowledged = 0
    for i, entry in enumerate(recorder.log):
        acknowledged = entry[2] if entry[0] == "ack" else acknowledged
        outcome["cuts"] += 1
        for state in range(states_per_cut):
            data, name = (
                [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)][state] if state < 3 else (rng.random(), rng.random())
            )
            target = base / "state"
            after_power_cut(
                recorder.log[: i + 1],
                target,
                lambda p=data: rng.random() < p,
                lambda p=name: rng.random() < p,
            )
            outcome["states"] += 1
            try:
                outcome["lost"] += load(target / "ckpt") < acknowledged
            except Exception as error:
                if outcome["broken"] == 0:
                    print(f"after operation {i}: {error}", file=sys.stderr)
                outcome["broken"] += 1
            shutil.rmtree(target)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kills", "kills-control", "power"])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ckpt"
        if args.what == "power":
            outcome = power_cuts(root, max(args.count // 100, 4), max(args.count // 100, 4), args.seed)
        elif args.what == "kills":
            outcome = kills(root, args.count, args.seed)
        else:
            outcome = kills(root, args.count, args.seed, save_in_place, load_in_place)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
