"""Data sets of the hub or a mirror, and a few plain files: fetched in parallel, verified, recorded.

A file gets its final name only after size and hash agree with what the hub, or the mirror's SHA256SUMS,
says; nanochat.data.download.manifest tells what is kept about each, nanochat.data.download.hub_client where
it comes from. Offline
opens no connection.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import os
import re
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from nanochat.data.download.hub_client import PLAIN, listing, transfer
from nanochat.data.download.manifest import (
    MANIFEST,
    UNKNOWN,
    Entry,
    Repo,
    is_here,
    is_inside,
    parquet_metadata,
    read_manifest,
    record,
)  # fmt: skip
from nanochat.data.download.progress import Progress
from nanochat.data.download.transfer import hash_file, locked, publish
from nanochat.errors import UserError
from nanochat.home import Home, write_json

VALIDATION_SHARDS = {"karpathy/climbmix-400b-shuffle": "shard_06542.parquet"}
NUM_PARALLEL = 8
RESERVED_BYTES = 1 << 30  # disk that fetching leaves free


def open_repo(
    name: str, home: Home | None = None, mirror: str | None = None, offline: bool = False, revision: str = ""
) -> Repo:
    """OWNER/NAME. Files of a mirror, or of a named revision, have directories of their own and never mix."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        example = next(iter(VALIDATION_SHARDS))
        raise UserError(f"a data set is named OWNER/NAME, found {name!r}", f"for example {example}")
    mirror = mirror or os.environ.get("NANOCHAT_MIRROR") or None
    if mirror and "://" not in mirror:
        mirror = str(Path(mirror).expanduser().resolve())
    origin = f"mirror-{hashlib.sha256(mirror.encode()).hexdigest()[:8]}" if mirror else "hub"
    folder = name + (f"@{re.sub('[^A-Za-z0-9._-]', '_', revision)}" if revision else "")
    return Repo(name, revision or None, mirror, offline, (home or Home.find()).data_dir / origin / folder)


def fetch_shards(
    spec: str, home: Home, num_shards: int | None = None, mirror: str | None = None, offline: bool = False
) -> tuple[Path, list[Entry]]:
    """(directory, entries) of OWNER/NAME[@revision][:glob]: num_shards training files, and validation's."""
    repo, entries = list_shards(spec, home, num_shards, mirror, offline)
    return repo.directory, fetch(repo, [entry["name"] for entry in entries])


def list_shards(
    spec: str, home: Home, num_shards: int | None = None, mirror: str | None = None, offline: bool = False
) -> tuple[Repo, list[Entry]]:
    """What fetch_shards would fetch: the entries of the training shards, then those of validation."""
    name, _, pattern = spec.partition(":")
    name, _, revision = name.partition("@")
    repo = open_repo(name, home, mirror, offline, revision)
    entries = _matching(repo, pattern or "*.parquet")
    train = [entry for entry in entries if entry["role"] == "train"]
    if len(train) < (num_shards or 1):
        problem = f"{name} has {len(train)} training files that match, {num_shards or 1} were asked for"
        raise UserError(problem, "ask for fewer, or check the pattern")
    return repo, train[:num_shards] + [entry for entry in entries if entry["role"] == "val"]


def dataset_files(
    name: str, pattern: str, *, home: Home | None = None, mirror: str | None = None, offline: bool = False,
    rehash: bool = False,
) -> list[Path]:  # fmt: skip
    """Verified local files of OWNER/NAME whose path matches, fetched if need be, by name; at least one.

    rehash: hash also what has been verified before, and fetch anew what has changed since.
    """
    repo = open_repo(name, home, mirror, offline)
    names = [entry["name"] for entry in _matching(repo, pattern)]
    if not names:
        raise UserError(f"{name} has no file that matches {pattern!r}", "check the pattern, or the mirror")
    if rehash:
        verify(repo, names)
    return [repo.directory / entry["name"] for entry in fetch(repo, names)]


def plain_file(
    name: str, *, home: Home | None = None, mirror: str | None = None, offline: bool = False
) -> Path:
    """One of PLAIN_URLS, local and verified; a mirror may hold it with .gz behind its name."""
    repo = open_repo(PLAIN, home, mirror, offline)
    found = _matching(repo, name) or _matching(repo, name + ".gz")
    if not found:
        raise UserError(f"the mirror {repo.mirror} has no {name}", "add it, and its line in SHA256SUMS")
    fetch(repo, [found[0]["name"]])
    path = repo.directory / name
    if found[0]["name"] != name:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        with gzip.open(f"{path}.gz") as packed, temporary.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        publish(temporary, path)
    return path


def fetch(repo: Repo, names: list[str], quiet: bool = False) -> list[Entry]:
    """The entries of `names`, once every file is there and verified; files in parallel, a lock for each.

    UserError if one of them is not to be had, after all others have been tried.
    """
    wanted = set(names)
    entries = {entry["name"]: entry for entry in read_manifest(repo.directory)["shards"]}
    missing = [entries[name] for name in dict.fromkeys(names) if not is_here(repo, entries[name])]
    _check_space(repo, missing)
    sizes = [entry["size"] for entry in missing]
    stop, total = threading.Event(), None if None in sizes else sum(sizes)
    with (
        Progress(f"fetching {repo.name}", len(missing), total, quiet or not missing) as progress,
        ThreadPoolExecutor(NUM_PARALLEL) as pool,
    ):
        try:
            jobs = {
                pool.submit(_fetch_one, repo, entry["name"], progress, stop): entry["name"]
                for entry in missing
            }
            failed = _failures(jobs, entries)
        except BaseException:  # Ctrl-C: what runs stops at its next block, what waits is dropped
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        first = next(iter(failed.values()))
        problem = (
            f"{len(failed)} of {len(wanted)} files were not fetched, {', '.join(failed)}: {first.problem}"
        )
        raise first if len(wanted) == 1 else UserError(problem, first.hint)
    return [entries[name] for name in names]


def fetch_one(repo: Repo, name: str, stop: threading.Event | None = None) -> Entry:
    """One file, as `fetch` would, without a word. Stopped once `stop` is set."""
    entry = next(entry for entry in read_manifest(repo.directory)["shards"] if entry["name"] == name)
    if is_here(repo, entry):
        return entry
    _check_space(repo, [entry])
    return _fetch_one(repo, name, Progress("", 1, None, quiet=True), stop or threading.Event())


def _check_space(repo: Repo, missing: list[Entry]) -> None:
    size, free = sum(entry["size"] or 0 for entry in missing), shutil.disk_usage(repo.directory).free
    if size > max(0, free - RESERVED_BYTES):
        problem = f"{repo.name}: {size / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB of disk are free"
        raise UserError(problem, "ask for fewer shards, or choose another --home")


def _failures(jobs: dict[Future[Entry], str], entries: dict[str, Entry]) -> dict[str, UserError]:
    """Wait for all jobs: new entries go into `entries`, what people must know is returned by name."""
    failed = {}
    for job in as_completed(jobs):
        try:
            entries[jobs[job]] = job.result()
        except UserError as error:
            failed[jobs[job]] = error
    return dict(sorted(failed.items()))


def verify(repo: Repo, names: list[str] | None = None) -> list[str]:
    """Hash all files (or `names`) recorded as verified; rename damaged ones to corrupt-NAME, return them."""
    bad = []
    for entry in read_manifest(repo.directory)["shards"]:
        path, asked = repo.directory / entry["name"], names is None or entry["name"] in names
        if asked and entry["verified"] and not (path.exists() and hash_file(path) == entry["sha256"]):
            quarantine(repo, entry["name"])
            bad.append(entry["name"])
    return bad


def quarantine(repo: Repo, name: str) -> None:
    """Rename a damaged file to corrupt-NAME, so that the next fetch brings it anew."""
    path = repo.directory / name
    with locked(path):
        if path.exists():
            path.replace(path.with_name(f"corrupt-{path.name}"))
        record(repo.directory, name, {"verified": False})


def evict(repo: Repo, name: str) -> None:
    """Delete a file that can be fetched again; its recorded hash stays and is enforced then."""
    path = repo.directory / name
    with locked(path):
        record(repo.directory, name, {"verified": False})
        path.unlink(missing_ok=True)


def _matching(repo: Repo, pattern: str) -> list[Entry]:
    """Entries whose name matches; the manifest is made from the source's listing at the first contact."""
    path = repo.directory / MANIFEST
    if not path.exists():
        repo.refuse_offline(repo.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not path.exists():
                revision, found = listing(repo)
                shards = []
                for entry in sorted(found, key=lambda entry: entry["name"]):
                    role = "val" if entry["name"] == VALIDATION_SHARDS.get(repo.name) else "train"
                    if is_inside(entry["name"]):
                        shards.append({"name": entry["name"], "role": role} | UNKNOWN | entry)
                write_json(path, {"source": repo.name, "revision": revision, "shards": shards})
    entries = read_manifest(repo.directory)["shards"]
    return [entry for entry in entries if fnmatch.fnmatchcase(entry["name"], pattern)]


def _fetch_one(repo: Repo, name: str, progress: Progress, stop: threading.Event) -> Entry:
    path = repo.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        manifest = read_manifest(repo.directory)
        entry = next(entry for entry in manifest["shards"] if entry["name"] == name)
        if not is_here(repo, entry):  # another process may have been faster
            # a process stopped between publishing and recording leaves the right file behind
            if not (path.exists() and entry["sha256"] == hash_file(path)):
                transfer(repo, manifest["revision"], entry, path, on_bytes=progress.advance, stop=stop)
            sha256 = entry["sha256"] or hash_file(path)  # a known one has just been compared
            facts = {"size": path.stat().st_size, "sha256": sha256, "verified": True}
            if path.suffix == ".parquet":
                metadata = parquet_metadata(path)
                facts |= {"rows": metadata.num_rows, "row_groups": metadata.num_row_groups}
            entry = record(repo.directory, name, facts)
    progress.file_done()
    return entry
