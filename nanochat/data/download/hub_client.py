"""What is said to the hub, or to a mirror in its place: what is there, and one file of it.

huggingface_hub resolves names, revisions, addresses and tokens (HF_ENDPOINT and HF_TOKEN honoured); the
bytes come through nanochat.data.download.transfer, which resumes after a kill and checks what it gets. A
mirror is a
directory or URL that holds SHA256SUMS and datasets/OWNER/NAME/FILE.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from nanochat.data.download.manifest import Entry, Repo
from nanochat.data.download.transfer import RETRIED_STATUS, agrees, fetch_url, publish, retry_after
from nanochat.errors import UserError

PLAIN = "plain/files"  # what is not on the hub is kept under the same rules, as if it were a data set
_WORDS = "https://raw.githubusercontent.com/dwyl/english-words"
PLAIN_URLS = {
    "eval_bundle.zip": "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    "words/words_alpha.txt": f"{_WORDS}/refs/heads/master/words_alpha.txt",
}
LIST_TRIES, LIST_WAIT_SECONDS = 6, 1.0


def listing(repo: Repo) -> tuple[str | None, list[Entry]]:
    """(revision, or None where there is none to know; an entry for every file, with what is told of it)."""
    if repo.mirror:
        return None, _list_mirror(repo)
    if repo.name == PLAIN:
        return None, [{"name": name} for name in PLAIN_URLS]
    return _list_hub(repo)


def transfer(repo: Repo, revision: str | None, entry: Entry, path: Path, **options: Any) -> None:
    """Put one file at `path`, verified by all that is known of it. options: on_bytes, stop of fetch_url."""
    name, expected = entry["name"], {"sha256": entry["sha256"], "git_blob": entry.get("git")}
    if repo.mirror_dir:
        source, temporary = repo.mirror_dir / _prefix(repo) / name, path.with_name(f"{path.name}.part")
        if not source.is_file():
            raise UserError(f"the mirror has no {source}", "complete it, or correct its SHA256SUMS")
        shutil.copyfile(source, temporary)
        if entry["size"] not in (None, temporary.stat().st_size) or not agrees(temporary, **expected):
            temporary.unlink()
            problem = f"{source} does not agree with its recorded size and hash"
            raise UserError(problem, "its source is damaged")
        publish(temporary, path)
        if on_bytes := options.get("on_bytes"):
            on_bytes(path.stat().st_size)
        return
    repo.refuse_offline(name)
    if repo.mirror:
        url = f"{repo.mirror.rstrip('/')}/{_prefix(repo)}{name}"
    elif repo.name == PLAIN:
        url = PLAIN_URLS[name]
    else:
        url, options["headers"] = _hub_address(repo, revision, name)
    fetch_url(url, path, **expected, **options)


def _prefix(repo: Repo) -> str:
    """Where the files lie below a mirror's root."""
    return "" if repo.name == PLAIN else f"datasets/{repo.name}/"


def _list_mirror(repo: Repo) -> list[Entry]:
    """Names and hashes from SHA256SUMS; in a directory without it, names alone."""
    root, prefix = repo.mirror_dir, _prefix(repo)
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
    found = [{"name": name[len(prefix) :], "sha256": sha} for sha, name in lines if name.startswith(prefix)]
    for entry in found if root else ():
        path = Path(root or "", prefix, entry["name"])
        entry["size"] = path.stat().st_size if path.is_file() else None
    return found


def _list_hub(repo: Repo) -> tuple[str | None, list[Entry]]:
    import huggingface_hub as hf

    api, wait = hf.HfApi(endpoint=os.environ.get("HF_ENDPOINT")), LIST_WAIT_SECONDS
    for is_last in (*(LIST_TRIES - 1) * [False], True):
        try:
            info = api.dataset_info(repo.name, revision=repo.revision, files_metadata=True, timeout=60.0)
            break
        except Exception as error:  # the client's error types differ between its versions
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            offline = hf.constants.HF_HUB_OFFLINE
            if is_last or offline or (status is not None and status not in RETRIED_STATUS):
                problem = f"the hub does not list {repo.name}: {' '.join(str(error).split())}"
                raise UserError(problem, "check name, revision and connection") from error
            asked = "" if response is None else response.headers.get("Retry-After", "")
            time.sleep(retry_after(asked, wait))
            wait *= 2
    found: list[Entry] = []
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        found.append({"name": file.rfilename, "size": file.size, "sha256": sha256, "git": file.blob_id})
    return info.sha, found


def _hub_address(repo: Repo, revision: str | None, name: str) -> tuple[str, dict[str, str]]:
    """(URL of a file at a recorded revision, the headers that may carry the user's token)."""
    import huggingface_hub as hf

    if hf.constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name} is not here and HF_HUB_OFFLINE forbids to fetch it", "fetch it first, online"
        )
    if revision is None:
        raise UserError(f"{repo.directory} records no revision of {repo.name}", "delete it and fetch again")
    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf.hf_hub_url(repo.name, name, repo_type="dataset", revision=revision, endpoint=endpoint)
    return url, dict(hf.utils.build_hf_headers(library_name="nanochat"))
