"""The only downloader: data sets of the hub, the same from a mirror, and a few plain files.

A file gets its final name only after size and sha256 agree with what the hub, or the mirror's SHA256SUMS,
says. shards.json beside the files keeps revision, roles, sizes, hashes and rows; what nobody has told us is
null, is recorded at the first contact and enforced from then on. A mirror is a directory or URL that holds
SHA256SUMS and datasets/OWNER/NAME/FILE. Hub files move by huggingface_hub (HF_ENDPOINT honoured). Offline
opens no connection.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.data.fetch import fetch_url, hash_file, locked, publish
from nanochat.errors import UserError
from nanochat.paths import Home, read_json, write_json

MANIFEST = "shards.json"
VALIDATION_SHARDS = {"karpathy/climbmix-400b-shuffle": "shard_06542.parquet"}
PLAIN = "plain/files"  # what is not on the hub is kept under the same rules, as if it were a data set
_WORDS = "https://raw.githubusercontent.com/dwyl/english-words"
PLAIN_URLS = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "words/words_alpha.txt": f"{_WORDS}/refs/heads/master/words_alpha.txt",
}
NUM_PARALLEL = 8
URLS = ("http://", "https://")
RESERVED_BYTES = 1 << 30  # disk that fetching leaves free

Entry = dict[str, Any]


@dataclass(frozen=True)
class Repo:
    """A data set, where it comes from, and the directory that holds its files and manifest."""

    name: str
    revision: str | None
    mirror: str | None
    offline: bool
    directory: Path

    @property
    def mirror_dir(self) -> Path | None:
        return Path(self.mirror) if self.mirror and not self.mirror.startswith(URLS) else None

    @property
    def prefix(self) -> str:
        """Where the files lie below a mirror's root."""
        return "" if self.name == PLAIN else f"datasets/{self.name}/"


def open_repo(
    name: str, home: Home | None = None, mirror: str | None = None, offline: bool = False, revision: str = ""
) -> Repo:
    """OWNER/NAME. Files of a mirror, or of a named revision, have directories of their own and never mix."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        example = next(iter(VALIDATION_SHARDS))
        raise UserError(f"a data set is named OWNER/NAME, found {name!r}", f"for example {example}")
    mirror = mirror or os.environ.get("NANOCHAT_MIRROR") or None
    if mirror and not mirror.startswith(URLS):
        mirror = str(Path(mirror).expanduser().resolve())
    origin = f"mirror-{hashlib.sha256(mirror.encode()).hexdigest()[:8]}" if mirror else "hub"
    folder = name + (f"@{re.sub('[^A-Za-z0-9._-]', '_', revision)}" if revision else "")
    return Repo(name, revision or None, mirror, offline, (home or Home.find()).data_dir / origin / folder)


def fetch_shards(
    spec: str, home: Home, num_shards: int | None = None, mirror: str | None = None, offline: bool = False
) -> tuple[Path, list[Entry]]:
    """(directory, entries) of OWNER/NAME[@revision][:glob]: num_shards training files, and validation's."""
    name, _, pattern = spec.partition(":")
    name, _, revision = name.partition("@")
    repo = open_repo(name, home, mirror, offline, revision)
    entries = _matching(repo, pattern or "*.parquet")
    train = [entry["name"] for entry in entries if entry["role"] == "train"]
    if len(train) < (num_shards or 1):
        problem = f"{name} has {len(train)} training files that match, {num_shards or 1} were asked for"
        raise UserError(problem, "ask for fewer, or check the pattern")
    val = [entry["name"] for entry in entries if entry["role"] == "val"]
    return repo.directory, fetch(repo, train[:num_shards] + val)


def dataset_files(
    name: str, pattern: str, *, home: Home | None = None, mirror: str | None = None, offline: bool = False
) -> list[Path]:
    """Verified local files of OWNER/NAME whose path matches, fetched if need be, by name; at least one."""
    repo = open_repo(name, home, mirror, offline)
    names = [entry["name"] for entry in _matching(repo, pattern)]
    if not names:
        raise UserError(f"{name} has no file that matches {pattern!r}", "check the pattern, or the mirror")
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


def fetch(repo: Repo, names: list[str]) -> list[Entry]:
    """The entries of `names`, once every file is there and verified; files in parallel, a lock for each."""
    wanted = set(names)
    entries = [entry for entry in read_manifest(repo.directory)["shards"] if entry["name"] in wanted]
    size = sum(entry["size"] or 0 for entry in entries if not entry["verified"])
    free = shutil.disk_usage(repo.directory).free
    if size > max(0, free - RESERVED_BYTES):
        problem = f"{repo.name}: {size / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB of disk are free"
        raise UserError(problem, "ask for fewer shards, or choose another --home")
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        return list(pool.map(lambda name: _fetch_one(repo, name), names))


def verify(repo: Repo) -> list[str]:
    """Hash all files recorded as verified; rename damaged ones to corrupt-NAME and return the bad names."""
    bad = []
    for entry in read_manifest(repo.directory)["shards"]:
        path = repo.directory / entry["name"]
        if entry["verified"] and not (path.exists() and hash_file(path) == entry["sha256"]):
            if path.exists():
                path.replace(path.with_name(f"corrupt-{path.name}"))
            _record(repo, entry["name"], {"verified": False})
            bad.append(entry["name"])
    return bad


# the manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """{"revision": hex or null, "shards": [{name, role, size, sha256, rows, row_groups, verified}]}."""
    value = read_json(directory / MANIFEST)
    try:
        roles = {entry["role"] if _is_inside(entry["name"]) else None for entry in value["shards"]}
    except (TypeError, KeyError):
        roles = {None}
    if not roles <= {"train", "val"}:
        raise UserError(f"{directory / MANIFEST} is not a manifest of shards", "docs/data.md shows its form")
    return value


def verified(entries: list[Entry], directory: Path) -> list[Entry]:
    """The entries not marked as unverified; UserError when the file of one is missing or has another size."""
    entries = [entry for entry in entries if entry.get("verified", True)]
    for entry in entries:
        path = directory / entry["name"]
        if not path.exists() or entry.get("size") not in (None, path.stat().st_size):
            found = "of another size than" if path.exists() else "missing, but listed in"
            raise UserError(f"{path} is {found} {MANIFEST}", "fetch it again: python -m scripts.data --help")
    return entries


def _is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _matching(repo: Repo, pattern: str) -> list[Entry]:
    """Entries whose name matches; the manifest is made from the source's listing at the first contact."""
    path = repo.directory / MANIFEST
    if not path.exists():
        _refuse_offline(repo, repo.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not path.exists():
                write_json(path, _first_contact(repo))
    entries = read_manifest(repo.directory)["shards"]
    return [entry for entry in entries if fnmatch.fnmatchcase(entry["name"], pattern)]


def _first_contact(repo: Repo) -> dict[str, Any]:
    revision, listing = (None, _list_mirror(repo)) if repo.mirror else _list_hub(repo)
    unknown = {"size": None, "sha256": None, "rows": None, "row_groups": None, "verified": False}
    shards = []
    for entry in sorted(listing, key=lambda entry: entry["name"]):
        role = "val" if entry["name"] == VALIDATION_SHARDS.get(repo.name) else "train"
        if _is_inside(entry["name"]):
            shards.append({"name": entry["name"], "role": role} | unknown | entry)
    return {"source": repo.name, "revision": revision, "shards": shards}


def _record(repo: Repo, name: str, facts: Entry) -> Entry:
    """Change one entry of the manifest and return it."""
    with locked(repo.directory / MANIFEST):
        value = read_manifest(repo.directory)
        entry = next(entry for entry in value["shards"] if entry["name"] == name)
        entry.update(facts)
        write_json(repo.directory / MANIFEST, value)
    return entry


# contact with the hub or a mirror


def _refuse_offline(repo: Repo, what: str) -> None:
    if repo.offline and not repo.mirror_dir:
        raise UserError(f"{what} is not here and --offline forbids to fetch it", "fetch it first, online")


def _list_mirror(repo: Repo) -> list[Entry]:
    """Names and hashes from SHA256SUMS; in a directory without it, names alone."""
    root, prefix = repo.mirror_dir, repo.prefix
    if root is None:
        sums = fetch_url(f"{str(repo.mirror).rstrip('/')}/SHA256SUMS", repo.directory / "SHA256SUMS")
    else:
        sums = root / "SHA256SUMS"
        if not root.is_dir():
            raise UserError(f"the mirror {root} is not a directory", "correct --mirror or NANOCHAT_MIRROR")
        if not sums.exists():
            files = [path for path in (root / prefix).rglob("*") if path.is_file()]
            return [{"name": path.relative_to(root / prefix).as_posix()} for path in files]
    lines = re.findall(r"^([0-9a-f]{64}) [ *](?:\./)?(.+)$", sums.read_text(encoding="utf-8"), re.MULTILINE)
    return [{"name": name[len(prefix) :], "sha256": sha} for sha, name in lines if name.startswith(prefix)]


def _list_hub(repo: Repo) -> tuple[str | None, list[Entry]]:
    if repo.name == PLAIN:
        return None, [{"name": name} for name in PLAIN_URLS]
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = api.dataset_info(repo.name, revision=repo.revision, files_metadata=True, timeout=60.0)
    except Exception as error:  # the client's error types differ between its versions
        problem = f"the hub does not list {repo.name}: {' '.join(str(error).split())}"
        raise UserError(problem, "check name, revision and connection") from error
    listing = []
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        listing.append({"name": file.rfilename, "size": file.size, "sha256": sha256, "git": file.blob_id})
    return info.sha, listing


def _fetch_one(repo: Repo, name: str) -> Entry:
    path = repo.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        manifest = read_manifest(repo.directory)
        entry = next(entry for entry in manifest["shards"] if entry["name"] == name)
        if entry["verified"] and path.exists() and path.stat().st_size == entry["size"]:
            return entry
        if path.exists() and entry["sha256"] == hash_file(path):
            pass  # a process was stopped between publishing and recording it
        elif repo.mirror_dir:
            source, temporary = repo.mirror_dir / repo.prefix / name, path.with_name(f"{path.name}.part")
            if not source.is_file():
                raise UserError(f"the mirror has no {source}", "complete it, or correct its SHA256SUMS")
            shutil.copyfile(source, temporary)
            _check(temporary, entry, str(source))
            publish(temporary, path)
        elif repo.offline:
            _refuse_offline(repo, name)
        elif repo.mirror:
            fetch_url(f"{repo.mirror.rstrip('/')}/{repo.prefix}{name}", path, entry["sha256"])
        elif repo.name == PLAIN:
            fetch_url(PLAIN_URLS[name], path, entry["sha256"])
        else:
            _from_hub(repo, manifest["revision"], entry, path)
        facts = {"size": path.stat().st_size, "sha256": hash_file(path), "verified": True}
        if path.suffix == ".parquet":
            metadata = parquet_metadata(path)
            facts |= {"rows": metadata.num_rows, "row_groups": metadata.num_row_groups}
        return _record(repo, name, facts)


def _from_hub(repo: Repo, revision: str | None, entry: Entry, path: Path) -> None:
    """Two tries: what does not agree with the hub's own record is deleted and fetched once more."""
    from huggingface_hub import hf_hub_download

    for is_last in (False, True):
        try:
            name = hf_hub_download(
                repo.name, entry["name"], repo_type="dataset", revision=revision, force_download=is_last,
                local_dir=repo.directory / ".incoming", endpoint=os.environ.get("HF_ENDPOINT"),
            )  # fmt: skip
            _check(Path(name), entry, f"the hub's {entry['name']}")
            publish(Path(name), path)
            return
        except UserError:
            if is_last:
                raise
        except Exception as error:  # the client's error types differ between its versions
            if is_last:
                problem = f"{entry['name']} of {repo.name}: {' '.join(str(error).split())}"
                raise UserError(problem, "run the same command again; what arrived is kept") from error


def _check(path: Path, entry: Entry, what: str) -> None:
    """Size, and sha256 or git's blob hash, against the record; a file that disagrees is deleted."""
    size, good = path.stat().st_size, True
    if entry["sha256"]:
        good = hash_file(path) == entry["sha256"]
    elif entry.get("git"):
        good = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == entry["git"]
    if not good or entry["size"] not in (None, size):
        path.unlink()
        raise UserError(f"{what} does not agree with its recorded size and hash", "its source is damaged")


def parquet_metadata(path: Path) -> Any:
    """A parquet file's footer, as pyarrow gives it; UserError if it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as parquet: {error}", "delete it and fetch it again"
        ) from error
