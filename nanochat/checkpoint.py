"""Checkpoints: atomic save, manifest last, verified load, retention. Safetensors and JSON, never pickle.

    root/step-00001000/   *.safetensors  state.json  manifest.json (step, meta, size and sha256 of every file)
    root/best.json        the step with the lowest validation value
    root/tmp-*  trash-*   being written, being deleted: never read      root/.lock  held by whoever writes
    root/corrupt-*        failed verification on load; kept for the person to look at
    root/aside-*          newer than the step a run was taken back to; kept, never read

A checkpoint exists only if its name is final and its manifest verifies. numpy only; turning torch tensors
into arrays is the caller's part. Ranks meet in `gather(obj) -> list of every rank's obj`.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from nanochat import storage
from nanochat.errors import UserError
from nanochat.storage import Damaged

FORMAT = 1
MANIFEST, STATE, BEST, LOCK = "manifest.json", "state.json", "best.json", ".lock"
SPACE_FACTOR, SPACE_RESERVE_BYTES = 1.2, 16 << 20
LOCK_WAIT_SECONDS = 10.0

Gather = Callable[[Any], list[Any]]
Value = TypeVar("Value")


class SaveFailed(OSError):
    """A save did not happen; the checkpoints that were there still are. The loop may train on, and retry."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; `state` and `meta` as they were saved, the arrays read when asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    meta: dict[str, Any]
    world_size: int
    records: dict[str, dict[str, Any]] = field(repr=False)

    def tensors(self, stem_prefix: str) -> dict[str, np.ndarray]:
        """The arrays of every file whose stem starts with `stem_prefix`, merged; empty when there is none."""
        merged: dict[str, np.ndarray] = {}
        for name in sorted(self.records):
            if name.startswith(stem_prefix) and name.endswith(".safetensors"):
                arrays = _read_tensors(self.path / name)
                if twice := merged.keys() & arrays.keys():
                    raise ValueError(
                        f"{self.path / name}: {min(twice)!r} is in another {stem_prefix}* file too"
                    )
                merged |= arrays
        return merged


def list_steps(root: Path) -> list[int]:
    """Published steps, oldest first, unverified. A missing directory has none."""
    with contextlib.suppress(FileNotFoundError):
        found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in root.iterdir())
        return sorted(int(match[1]) for match in found if match)
    return []


def step_path(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


# -- save ----------------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    files: dict[str, dict[str, np.ndarray]],
    state: dict[str, Any],
    *,
    meta: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> Path:
    """Publish a checkpoint of every rank's `files` (stem -> named arrays) and rank 0's `state`; its path.

    `state` and `meta` hold JSON values, no NaN. On a fault of the disk, on any rank, every rank raises
    SaveFailed and only the own temporary directory is gone. A step that exists with the same tensors is left
    as it is; with others it is a UserError, for a valid step is never overwritten.
    """
    meet = gather or (lambda value: [value])
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            return _begin(root, step, files, world_size, stack) if rank == 0 else ""

        def write() -> dict[str, dict[str, Any]]:
            return _write_files(temporary, files, state if rank == 0 else None)

        def publish() -> None:
            if rank == 0:
                body = {
                    "format": FORMAT,
                    "step": step,
                    "world_size": world_size,
                    "meta": meta,
                    "files": records,
                }
                _publish(root, temporary, step, body)

        temporary = root / _together(meet, step, begin)[0]
        parts = _together(meet, step, write)
        records = {name: record for part in parts for name, record in part.items()}
        if len(records) < sum(map(len, parts)):
            raise ValueError(
                f"each rank must write its own file names, found {[sorted(part) for part in parts]}"
            )
        _together(meet, step, publish)
    return step_path(root, step)


def _together(meet: Gather, step: int, act: Callable[[], Value]) -> list[Value]:
    """Every rank's result of `act`; what fails on any rank fails on all, so that nobody is left waiting."""
    value, failure = None, None
    try:
        value = act()
    except Exception as error:  # raised below, on every rank
        failure = error
    outcomes = meet((value, failure))
    failures = [(rank, error) for rank, (_, error) in enumerate(outcomes) if error is not None]
    for _, problem in failures:
        if not isinstance(problem, OSError):
            raise problem
    for rank, problem in failures:
        where = f" on rank {rank}" if len(outcomes) > 1 else ""
        raise SaveFailed(f"step {step} was not saved{where}: {problem}") from failure
    return [value for value, _ in outcomes]


def _begin(root: Path, step: int, files: dict, world_size: int, stack: contextlib.ExitStack) -> str:
    """Take the lock, see that there is room, make the temporary directory; its name."""
    storage.make_dirs(root)
    if not stack.enter_context(storage.lock(root / LOCK, LOCK_WAIT_SECONDS)):
        raise SaveFailed(f"another process is writing in {root}")
    size = world_size * sum(array.nbytes for arrays in files.values() for array in arrays.values())
    for newest in list_steps(root)[-1:]:
        with contextlib.suppress(Damaged):
            size = max(size, sum(record["size"] for record in _manifest(root, newest)["files"].values()))
    storage.require_space(root, int(SPACE_FACTOR * size) + SPACE_RESERVE_BYTES)
    temporary = root / f"tmp-{step}-{secrets.token_hex(6)}"
    stack.callback(_discard, temporary)
    storage.os.mkdir(temporary)
    return temporary.name


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # `clean` will find it
        storage.remove(temporary)


def _write_files(temporary: Path, files: dict, state: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    records = {}
    if state is not None:
        records[STATE] = storage.write_file(temporary / STATE, storage.strict_json(state))
    for stem, arrays in files.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stem):
            raise ValueError(f"a file stem must be made of letters, digits, '_', '.' and '-', found {stem!r}")
        # safetensors takes the memory of a transposed array for row order, silently
        ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        for name, array in ordered.items():
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{stem}: arrays must hold plain numbers, found {array.dtype} in {name!r}")
        name = f"{stem}.safetensors"
        records[name] = storage.write_file(temporary / name, safetensors.numpy.save(ordered))
    return records


def _publish(root: Path, temporary: Path, step: int, manifest: dict[str, Any]) -> None:
    """Manifest last, then the final name."""
    target = step_path(root, step)
    if target.exists():
        try:
            found = _verify(root, step)
        except Damaged as damage:
            _warn(f"{damage}; the step is saved anew, the old one is {_set_aside(target, 'corrupt').name}")
        else:
            if _tensor_records(found) != _tensor_records(manifest):
                raise UserError(
                    f"{target} exists and holds other values", "resume from it or use another --tag"
                )
            return
    storage.write_file(temporary / MANIFEST, storage.sealed(manifest))
    storage.sync_dir(temporary)
    try:
        storage.rename(temporary, target)
    except OSError:
        if target.exists():  # renamed, perhaps not durably: this save has failed, so nobody may see it
            with contextlib.suppress(OSError):
                storage.os.rename(target, temporary)
        raise


def _tensor_records(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: record for name, record in manifest["files"].items() if name.endswith(".safetensors")}


# -- load ----------------------------------------------------------------------------------------------------


def load(root: Path, step: int | None = None, *, repair: bool, only: str | None = None) -> Checkpoint | None:
    """The newest good checkpoint, or step `step` exactly; None when there has never been one.

    A damaged step is named with its file on stderr and the one before it is taken. With `repair` (training,
    on rank 0; never chat or evaluation) the damaged step is renamed corrupt-*, leftovers of killed runs are
    deleted, and an explicit step sets the newer ones aside, else a later crash would resume the abandoned
    branch. After a read error nothing is renamed. UserError when an explicit step fails, or when steps exist
    and none is good. `only`: verify and offer just the files whose stem starts so, and the state.
    """
    if repair:
        clean(root)
    steps = list_steps(root)
    if step is not None and step not in steps:
        raise UserError(f"{root} holds no checkpoint of step {step}, only {steps}", "name one of these")
    problem = ""
    for candidate in reversed(steps) if step is None else [step]:
        try:
            found = _open(root, candidate, only)
        except (Damaged, OSError) as error:
            problem = problem or f"the checkpoint of step {candidate} cannot be used: {error}"
            if step is not None:
                continue
            _warn(f"the checkpoint of step {candidate} cannot be used: {error}")
            if repair and isinstance(error, Damaged):
                _warn(f"it is now {_set_aside(step_path(root, candidate), 'corrupt')}")
        else:
            if repair and step is not None:
                for newer in steps[steps.index(step) + 1 :]:
                    _warn(f"step {newer} is now {_set_aside(step_path(root, newer), 'aside')}")
            return found
    if problem:
        raise UserError(
            problem, f"take a good step with --resume, or delete {root} to start again from nothing"
        )
    if any(root.glob("corrupt-*")):
        raise UserError(
            f"{root} holds only damaged checkpoints", f"delete {root} to start again from nothing"
        )
    return None


def _open(root: Path, step: int, only: str | None) -> Checkpoint:
    manifest, path = _verify(root, step, only), step_path(root, step)
    records = {name: record for name, record in manifest["files"].items() if _wanted(name, only)}
    state = storage.json.loads(storage.read_bytes(path / STATE))
    return Checkpoint(path, step, state, manifest["meta"], manifest["world_size"], records)


def _wanted(name: str, only: str | None) -> bool:
    return only is None or name.startswith(only) or name == STATE


def _manifest(root: Path, step: int) -> dict[str, Any]:
    path = step_path(root, step) / MANIFEST
    manifest = storage.read_sealed(path)
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has format {manifest['format']}, not {FORMAT}", "use the code that wrote it")
    if manifest["step"] != step:
        raise Damaged(path, f"belongs to step {manifest['step']}")
    return manifest


def _verify(root: Path, step: int, only: str | None = None) -> dict[str, Any]:
    """The manifest, after hashing every file (or those wanted); Damaged names the first bad one."""
    manifest = _manifest(root, step)
    for name, record in sorted(manifest["files"].items()):
        if _wanted(name, only):
            storage.verify_file(step_path(root, step) / name, record)
    return manifest


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(storage.read_bytes(path))
    except safetensors.SafetensorError as error:
        raise Damaged(path, f"is not a safetensors file: {error}") from error


def _set_aside(path: Path, why: str) -> Path:
    """Rename a step so that it is never read again; nothing is deleted."""
    new = path.with_name(f"{why}-{path.name}-{secrets.token_hex(3)}")
    storage.rename(path, new)
    return new


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# -- retention -----------------------------------------------------------------------------------------------


def clean(root: Path) -> None:
    """Delete what killed runs left behind (tmp-*, trash-*), unless somebody is writing here right now."""
    if root.is_dir():
        with contextlib.suppress(OSError), storage.lock(root / LOCK) as held:
            for path in [*root.glob("tmp-*"), *root.glob("trash-*")] if held else []:
                storage.remove(path)


def prune(root: Path, keep: int = 2, protect: Iterable[int] = ()) -> list[int]:
    """Delete all but the newest `keep` verified steps, the best and those in `protect`; the steps deleted."""
    if keep < 2:
        raise ValueError(f"keep must be at least 2, so that a damaged step has one behind it, found {keep}")
    steps, good, deleted = list_steps(root), 0, []
    try:
        best = best_of(root)
        kept = {*protect} | ({best[0]} if best else set())
        for step in reversed(steps):
            if good < keep:
                kept.add(step)  # a damaged step among the newest is left for load to name
                with contextlib.suppress(Damaged):
                    _verify(root, step)
                    good += 1
        for step in steps:
            if step not in kept:
                trash = root / f"trash-{step}-{secrets.token_hex(6)}"
                storage.rename(step_path(root, step), trash)
                deleted.append(step)
                storage.remove(trash)
    except (Damaged, OSError) as error:
        _warn(f"old checkpoints stay where they are: {error}")
    return deleted


def best_of(root: Path) -> tuple[int, float] | None:
    """(step, value) of the best checkpoint; None when none was recorded; Damaged when the record is."""
    if not (root / BEST).exists():
        return None
    body = storage.read_sealed(root / BEST)
    return body["step"], body["value"]


def mark_best(root: Path, step: int, value: float) -> bool:
    """Record `step` as the best if its validation value is the lowest so far; whether it was. SaveFailed."""
    best = None
    with contextlib.suppress(Damaged):
        best = best_of(root)
    if best is not None and best[1] <= value and best[0] in list_steps(root):
        return False
    try:
        storage.replace_file(root / BEST, storage.sealed({"step": step, "value": value}))
    except OSError as error:
        raise SaveFailed(f"step {step} was not recorded as the best: {error}") from error
    return True
