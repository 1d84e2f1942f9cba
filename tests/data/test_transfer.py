"""Plain downloads from a server that lies: never a wrong byte under the final name, resumed if possible."""

import hashlib
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.faulty_server import FAULTS, serve

from nanochat.data.download.transfer import MAX_WAIT_SECONDS, Stopped, fetch_url, hash_file, retry_after
from nanochat.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(DATA).hexdigest()
FAST = {"wait_seconds": 0.001, "stall_seconds": 0.3}


def fetch(url, dest, **options):
    return fetch_url(f"{url}/file", dest, **{"sha256": SHA} | FAST | options)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_then_the_right_bytes(tmp_path, fault):
    with serve({"file": DATA}, [fault]) as (server, url):
        assert fetch(url, tmp_path / "file").read_bytes() == DATA
        assert len(server.requests) == (1 if fault in ("ignore_range", "new_etag") else 2)
        if fault == "stall":
            assert server.requests[1][2] == "bytes=200000-"
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["file"]


def test_a_cut_transfer_goes_on_where_it_stopped(tmp_path):
    with serve({"file": DATA}, ["cut", "cut"]) as (server, url):
        fetch(url, tmp_path / "file")
        assert [r[2] for r in server.requests] == [None, "bytes=200000-", "bytes=266666-"]


@pytest.mark.parametrize("second", ["wrong_range", "ignore_range", "new_etag", "flip"])
def test_a_resumed_transfer_that_lies(tmp_path, second):
    with serve({"file": DATA}, ["cut", second]) as (_, url):
        assert fetch(url, tmp_path / "file").read_bytes() == DATA


def test_resume_by_a_later_process_and_a_file_that_changed(tmp_path):
    with serve({"file": DATA}, ["cut"]) as (server, url):
        with pytest.raises(UserError, match="cut at 200000 of 300000"):
            fetch(url, tmp_path / "file", num_tries=1)
        assert not (tmp_path / "file").exists()
        other = DATA[::-1]
        server.files["file"], server.etag = other, 2
        found = fetch(url, tmp_path / "file", sha256=hashlib.sha256(other).hexdigest())
        assert found.read_bytes() == other  # If-Range kept the two versions apart
        assert server.requests[-1][2] == "bytes=200000-"


MANY = [25, pytest.param(1000, marks=pytest.mark.campaign)]


@pytest.mark.parametrize("trials", MANY)
def test_random_sequences_of_faults(tmp_path, trials):
    rng = random.Random(trials)
    for trial in range(trials):
        faults = rng.choices([fault for fault in FAULTS if fault != "stall"], k=rng.randint(0, 4))
        dest = tmp_path / str(trial)
        with serve({"file": DATA}, faults) as (_, url):
            try:
                assert fetch(url, dest, num_tries=8).read_bytes() == DATA
            except UserError:
                wrong = ("flip", "cut_no_length", "wrong_range")  # whole answers of other bytes
                assert sum(map(faults.count, wrong)) >= 2 and not dest.exists()


def test_wrong_content_is_refused_after_one_more_try(tmp_path):
    with (
        serve({"file": DATA[:-1] + b"x"}) as (server, url),
        pytest.raises(UserError, match="does not have the hash"),
    ):
        fetch(url, tmp_path / "file")
    assert len(server.requests) == 2 and not (tmp_path / "file").exists()


def test_without_a_hash_the_length_must_be_known(tmp_path):
    with serve({"file": DATA}, ["cut"]) as (_, url):
        assert hash_file(fetch(url, tmp_path / "a", sha256=None)) == SHA
    with serve({"file": DATA}, ["cut", "wrong_range"]) as (_, url):
        assert hash_file(fetch(url, tmp_path / "d", sha256=None)) == SHA
    with serve({"file": DATA}, ["cut_chunked"]) as (_, url):
        assert hash_file(fetch(url, tmp_path / "b", sha256=None)) == SHA
    with serve({"file": DATA}, ["cut_no_length"]) as (_, url), pytest.raises(UserError, match="how long"):
        fetch(url, tmp_path / "c", sha256=None)
    assert not (tmp_path / "c").exists()


def test_hopeless_answers_end_at_once_and_limits_hold(tmp_path):
    with serve({}) as (server, url), pytest.raises(UserError, match="answered 404"):
        fetch(url, tmp_path / "file")
    assert len(server.requests) == 1
    with serve({"file": DATA}, ["503"] * 9) as (server, url), pytest.raises(UserError, match="503"):
        fetch(url, tmp_path / "file", num_tries=4)
    assert len(server.requests) == 4
    with serve({"file": DATA}, ["500"] * 9) as (server, url), pytest.raises(UserError, match="500"):
        fetch(url, tmp_path / "file", total_seconds=0.05, wait_seconds=0.04, num_tries=99)
    assert len(server.requests) < 9


def test_a_token_stays_with_its_host(tmp_path):
    with serve({"file": DATA}, ["redirect", "cut", "redirect"]) as (server, url):
        fetch(url, tmp_path / "file", headers={"Authorization": "Bearer secret"})
        hosts = [(host.split(":")[0], token) for host, token in server.tokens]
    own, other = ("127.0.0.1", "Bearer secret"), ("localhost", None)
    assert hosts == [own, other, own, other]
    assert server.requests[3][2] == "bytes=200000-"  # resumed behind the redirect, too


def test_git_files_are_checked_by_their_blob_hash(tmp_path):
    blob = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
    with serve({"file": DATA}, ["flip"]) as (_, url):
        assert fetch(url, tmp_path / "a", sha256=None, git_blob=blob).read_bytes() == DATA
        with pytest.raises(UserError, match="does not have the hash"):
            fetch(url, tmp_path / "b", sha256=None, git_blob="0" * 40)


def test_stop_ends_a_transfer_and_a_wait_and_what_arrived_stays(tmp_path):
    stop, seen = threading.Event(), []

    def on_bytes(count):
        seen.append(count)
        if sum(seen) > 100_000:
            stop.set()

    with serve({"file": DATA}) as (server, url):
        with pytest.raises(Stopped):
            fetch(url, tmp_path / "file", on_bytes=on_bytes, stop=stop)
        assert 100_000 < sum(seen) == (tmp_path / "file.part").stat().st_size < len(DATA)
        fetch(url, tmp_path / "file")
        assert server.requests[1][2] == f"bytes={sum(seen)}-"
    with serve({}, []) as (server, url), pytest.raises(Stopped):
        server.files["file"], server.faults[:] = DATA, ["500"] * 3
        fetch(url, tmp_path / "other", stop=stop, wait_seconds=60)


def test_reported_bytes_add_up_whatever_happens(tmp_path):
    for faults in ([], ["cut", "cut"], ["flip"], ["cut", "new_etag"], ["cut", "wrong_range"], ["stall"]):
        seen = []
        with serve({"file": DATA}, faults) as (_, url):
            fetch(url, tmp_path / "-".join(["f", *faults]), on_bytes=seen.append)
        assert sum(seen) == len(DATA), faults


def test_retry_after_as_number_date_and_nonsense():
    assert retry_after("7", 1.5) == 7 and retry_after("9999", 1.5) == MAX_WAIT_SECONDS
    assert retry_after("Fri, 21 Nov 2025 09:00:00 GMT", 1.5) == 0
    assert retry_after("Fri, 21 Nov 2125 09:00:00 GMT", 1.5) == MAX_WAIT_SECONDS
    assert retry_after("", 1.5) == retry_after("soon", 1.5) == retry_after("-3", 1.5) == 1.5


CHILD = """
import sys
from pathlib import Path
from nanochat.data.download.transfer import fetch_url
fetch_url(sys.argv[1], Path(sys.argv[2]), sys.argv[3], wait_seconds=0.001)
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.campaign)])
def test_kill_9_at_any_moment_then_the_right_bytes_and_no_start_from_zero(tmp_path, kills):
    rng, dest = random.Random(kills), tmp_path / "file"
    command = [sys.executable, "-c", CHILD]
    with serve({"file": DATA}, ["cut", None, "503"]) as (server, url):
        server.pace = 0.02
        starts: list[int] = []
        for _ in range(kills):
            seen = len(server.requests)
            with subprocess.Popen([*command, f"{url}/file", str(dest), SHA], cwd=ROOT) as child:
                while len(server.requests) == seen and child.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.1))
                child.kill()
            starts += [int(asked[6:-1]) if asked else 0 for _, _, asked in server.requests[seen:]]
            assert starts == sorted(starts), starts  # every try goes on where the last one ended
            if dest.exists():
                assert dest.read_bytes() == DATA
                dest.unlink()
                starts = []
        server.pace = 0.0
        assert fetch(url, dest).read_bytes() == DATA
