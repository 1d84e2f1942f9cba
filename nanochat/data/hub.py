"""The only downloader: data sets of the hub, the same from a mirror, and a few plain files.

A file gets its final name only after its size and sha256 agree with what the hub, or the mirror's SHA256SUMS, says.
shards.json beside the files keeps the revision, and per file role, size, hash and rows; what nobody has told us is
null and is recorded at the first contact. A mirror is a directory or URL that holds datasets/OWNER/NAME/FILE and
SHA256SUMS. Hub files move by huggingface_hub (HF_ENDPOINT honoured), others by fetch. Offline opens no connection.
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

from nanochat.data.fetch import fetch_url, hash_file, publish
from nanochat.errors import UserError
from nanochat.paths import Home, read_json, write_json

MANIFEST = "shards.json"
VALIDATION_SHARDS = {"karpathy/climbmix-400b-shuffle": "shard_06542.parquet"}
PLAIN = "plain/files"  # files that are not on the hub, kept under the same rules as a data set
PLAIN_URLS = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "words/words_alpha.txt": "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt",
}
NUM_PARALLEL = 8

Entry = dict[str, Any]


@dataclass(frozen=True)
class Repo:
    """A data set, where it comes from, and the directory that holds its files and manifest."""

    name: str
    revision: str | None
    mirror: str | None
    offline: bool
    directory: Path


def open_repo(
    name: str,
    home: Home | None = None,
    mirror: str | None = None,
    offline: bool = False,
    revision: str | None = None,
) -> Repo:
    """OWNER/NAME. Files of a mirror or of a named revision live in directories of their own and never mix."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise UserError(
            f"a data set is named OWNER/NAME, found {name!r}", f"for example {next(iter(VALIDATION_SHARDS))}"
        )
    mirror = mirror or os.environ.get("NANOCHAT_MIRROR") or None
    origin = f"mirror-{hashlib.sha256(mirror.encode()).hexdigest()[:8]}" if mirror else "hub"
    folder = name + (f"@{re.sub('[^A-Za-z0-9._-]', '_', revision)}" if revision else "")
    return Repo(name, revision, mirror, offline, (home or Home.find()).data_dir / origin / folder)


def fetch_shards(
    spec: str, *, home: Home, num_shards: int | None = None, mirror: str | None = None, offline: bool = False
) -> tuple[Path, list[Entry]]:
    """(directory, entries) of OWNER/NAME[@revision][:glob]: the first num_shards training files, and validation's."""
    name, _, pattern = spec.partition(":")
    name, _, revision = name.partition("@")
    repo = open_repo(name, home, mirror, offline, revision or None)
    entries = _matching(repo, pattern or "*.parquet")
    train = [entry for entry in entries if entry["role"] == "train"]
    if len(train) < (num_shards or 1):
        raise UserError(
            f"{name} has {len(train)} training files that match, {num_shards or 1} were asked for",
            "ask for fewer",
        )
    chosen = train[:num_shards] + [entry for entry in entries if entry["role"] == "val"]
    return repo.directory, fetch(repo, [entry["name"] for entry in chosen])


def dataset_files(
    name: str, pattern: str, *, home: Home | None = None, mirror: str | None = None, offline: bool = False
) -> list[Path]:
    """Verified local files of OWNER/NAME whose path matches, fetched if need be, in order of name; at least one."""
    repo = open_repo(name, home, mirror, offline)
    names = [entry["name"] for entry in _matching(repo, pattern)]
    if not names:
        raise UserError(
            f"{name} has no file that matches {pattern!r}", "check the pattern, or what the mirror holds"
        )
    return [repo.directory / entry["name"] for entry in fetch(repo, names)]


def plain_file(
    name: str, *, home: Home | None = None, mirror: str | None = None, offline: bool = False
) -> Path:
    """One of PLAIN_URLS, verified and local; a mirror may hold it with .gz behind its name."""
    repo = open_repo(PLAIN, home, mirror, offline)
    found = _matching(repo, name) or _matching(repo, name + ".gz")
    if not found:
        raise UserError(f"the mirror {repo.mirror} has no {name}", "add the file, and its line in SHA256SUMS")
    path = repo.directory / fetch(repo, [found[0]["name"]])[0]["name"]
    if path.name.endswith(".gz") and not name.endswith(".gz"):
        packed, path = path, repo.directory / name
        if not path.exists():
            temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
            with gzip.open(packed) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target)
            publish(temporary, path)
    return path


def fetch(repo: Repo, names: list[str]) -> list[Entry]:
    """The manifest entries of `names` once all of them are on disk and verified; a lock a file, files in parallel."""
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        return list(pool.map(lambda name: _fetch_one(repo, name), names))


def verify(repo: Repo) -> list[str]:
    """Hash every file recorded as verified; set damaged ones aside as corrupt-NAME and return their names."""
    bad = []
    for entry in read_manifest(repo.directory)["shards"]:
        path = repo.directory / entry["name"]
        if entry.get("verified") and not (path.exists() and hash_file(path) == entry["sha256"]):
            if path.exists():
                path.replace(path.with_name(f"corrupt-{path.name}"))
            _record(repo, entry["name"], {"verified": False})
            bad.append(entry["name"])
    return bad


# the manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """shards.json: {"revision": 40 hex or null, "shards": [{name, role, size, sha256, rows, row_groups, verified}]}."""
    value = read_json(directory / MANIFEST)
    try:
        is_good = all(
            _is_inside(entry["name"]) and entry["role"] in ("train", "val") for entry in value["shards"]
        )
    except (TypeError, KeyError):
        is_good = False
    if not is_good:
        raise UserError(f"{directory / MANIFEST} is not a manifest of shards", "docs/data.md shows its form")
    return value


def verified(entries: list[Entry], directory: Path) -> list[Entry]:
    """The entries recorded as verified; UserError when one of their files is missing or has another size."""
    chosen = [entry for entry in entries if entry.get("verified", True)]
    for entry in chosen:
        path = directory / entry["name"]
        if not path.exists() or entry.get("size") not in (None, path.stat().st_size):
            raise UserError(
                f"{path} is {'of another size than' if path.exists() else 'missing, but'} {MANIFEST} says",
                "fetch it again (python -m scripts.data), or correct the manifest",
            )
    return chosen


def _is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _manifest(repo: Repo) -> dict[str, Any]:
    """The manifest on disk, made from the hub's or the mirror's listing at the first contact."""
    from filelock import FileLock

    if (repo.directory / MANIFEST).exists():
        return read_manifest(repo.directory)
    if repo.offline and not (repo.mirror and _is_directory(repo.mirror)):
        raise UserError(
            f"{repo.name} is not on this machine and --offline forbids to fetch it", "fetch it first, online"
        )
    repo.directory.mkdir(parents=True, exist_ok=True)
    with FileLock(repo.directory / f"{MANIFEST}.lock"):
        if not (repo.directory / MANIFEST).exists():
            revision, listing = _list_mirror(repo) if repo.mirror else _list_hub(repo)
            validation = VALIDATION_SHARDS.get(repo.name)
            shards = []
            for entry in sorted(listing, key=lambda entry: entry["name"]):
                role = "val" if entry["name"] == validation else "train"
                empty = {"size": None, "sha256": None, "rows": None, "row_groups": None}
                shards.append({"name": entry["name"], "role": role, **empty, **entry, "verified": False})
            write_json(
                repo.directory / MANIFEST, {"source": repo.name, "revision": revision, "shards": shards}
            )
    return read_manifest(repo.directory)


def _matching(repo: Repo, pattern: str) -> list[Entry]:
    return [entry for entry in _manifest(repo)["shards"] if fnmatch.fnmatchcase(entry["name"], pattern)]


def _record(repo: Repo, name: str, facts: Entry) -> Entry:
    """Change one entry of the manifest and return it."""
    from filelock import FileLock

    with FileLock(repo.directory / f"{MANIFEST}.lock"):
        value = read_manifest(repo.directory)
        entry = next(entry for entry in value["shards"] if entry["name"] == name)
        entry.update(facts)
        write_json(repo.directory / MANIFEST, value)
    return entry


# contact with the hub or a mirror


def _is_directory(mirror: str) -> bool:
    return not mirror.startswith(("http://", "https://"))


def _inside_mirror(repo: Repo) -> str:
    return "" if repo.name == PLAIN else f"datasets/{repo.name}/"


def _list_mirror(repo: Repo) -> tuple[None, list[Entry]]:
    """Names and hashes from SHA256SUMS; a directory without it is listed, and its hashes recorded as found."""
    assert repo.mirror
    sums = repo.directory / "SHA256SUMS"
    if _is_directory(repo.mirror):
        root = Path(repo.mirror).expanduser()
        if not root.is_dir():
            raise UserError(f"the mirror {root} is not a directory", "correct --mirror or NANOCHAT_MIRROR")
        if not (root / "SHA256SUMS").exists():
            top = root / _inside_mirror(repo)
            return None, [{"name": p.relative_to(top).as_posix()} for p in top.rglob("*") if p.is_file()]
        text = (root / "SHA256SUMS").read_text(encoding="utf-8")
    else:
        text = fetch_url(f"{repo.mirror.rstrip('/')}/SHA256SUMS", sums).read_text(encoding="utf-8")
        sums.unlink()
    found = re.findall(r"^([0-9a-f]{64}) [ *](?:\./)?(.+)$", text, re.MULTILINE)
    prefix = _inside_mirror(repo)
    inside = [
        {"name": name[len(prefix) :], "sha256": digest} for digest, name in found if name.startswith(prefix)
    ]
    return None, [entry for entry in inside if _is_inside(entry["name"])]


def _list_hub(repo: Repo) -> tuple[str | None, list[Entry]]:
    if repo.name == PLAIN:
        return None, [{"name": name} for name in PLAIN_URLS]
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).dataset_info(
            repo.name, revision=repo.revision, files_metadata=True, timeout=60.0
        )
    except Exception as error:  # the client's own error types differ between its versions
        raise UserError(
            f"the hub does not list {repo.name}: {error}", "check name, revision, connection"
        ) from error
    files = [
        {"name": file.rfilename, "size": file.size, "sha256": file.lfs.sha256, "blob": None}
        if file.lfs
        else {"name": file.rfilename, "size": file.size, "blob": file.blob_id}
        for file in info.siblings or []
        if _is_inside(file.rfilename)
    ]
    return info.sha, files


def _fetch_one(repo: Repo, name: str) -> Entry:
    from filelock import FileLock

    path = repo.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        entry = next(entry for entry in read_manifest(repo.directory)["shards"] if entry["name"] == name)
        if entry["verified"] and path.exists() and path.stat().st_size == entry["size"]:
            return entry
        if repo.mirror and _is_directory(repo.mirror):
            _copy(Path(repo.mirror).expanduser() / _inside_mirror(repo) / name, path, entry)
        elif repo.offline:
            raise UserError(f"{path} is missing and --offline forbids to fetch it", "fetch it first, online")
        elif repo.mirror:
            url = f"{repo.mirror.rstrip('/')}/{_inside_mirror(repo)}{name}"
            fetch_url(url, path, entry["sha256"])
        elif repo.name == PLAIN:
            fetch_url(PLAIN_URLS[name], path, entry["sha256"])
        else:
            _from_hub(repo, entry, path)
        facts = {"size": path.stat().st_size, "sha256": hash_file(path), "verified": True}
        return _record(repo, name, facts | _count_rows(path))


def _count_rows(path: Path) -> Entry:
    if path.suffix != ".parquet":
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not parquet, though its hash is the published one: {error}", "report it"
        ) from error
    return {"rows": metadata.num_rows, "row_groups": metadata.num_row_groups}


def _copy(source: Path, path: Path, entry: Entry) -> None:
    if not source.is_file():
        raise UserError(f"the mirror has no {source}", "complete the mirror, or leave --mirror out")
    temporary = path.with_name(f"{path.name}.part")
    shutil.copyfile(source, temporary)
    _check(temporary, entry, str(source))
    publish(temporary, path)


def _from_hub(repo: Repo, entry: Entry, path: Path) -> None:
    """Two tries: a file that does not agree with the hub's own record is deleted and fetched once more."""
    from huggingface_hub import hf_hub_download

    incoming = repo.directory / ".incoming"
    revision = read_manifest(repo.directory)["revision"]
    for is_last in (False, True):
        try:
            name = hf_hub_download(
                repo.name, entry["name"], repo_type="dataset", revision=revision, local_dir=incoming,
                endpoint=os.environ.get("HF_ENDPOINT"), force_download=is_last,
            )  # fmt: skip
        except Exception as error:  # the client's own error types differ between its versions
            if is_last:
                raise UserError(
                    f"{entry['name']} of {repo.name}: {error}", "run the same command again"
                ) from error
            continue
        try:
            _check(Path(name), entry, f"the hub's {entry['name']}")
        except UserError:
            if is_last:
                raise
            continue
        return publish(Path(name), path)


def _check(path: Path, entry: Entry, what: str) -> None:
    """Size, and sha256 or git's blob hash, against the record; the file is deleted when it disagrees."""
    size, good = path.stat().st_size, True
    if entry.get("sha256"):
        good = hash_file(path) == entry["sha256"]
    elif entry.get("blob"):
        good = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == entry["blob"]  # noqa: S324
    if not good or entry.get("size") not in (None, size):
        path.unlink()
        raise UserError(
            f"{what} does not agree with its recorded size and hash", "the source is damaged or has changed"
        )
