"""Plain downloads from a server that lies: never a wrong byte under the final name, resumed if possible."""

import hashlib
import random

import pytest
from faulty_server import FAULTS, serve

from nanochat.data.fetch import fetch_url, hash_file
from nanochat.errors import UserError

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


def test_random_sequences_of_faults(tmp_path):
    rng = random.Random(1)
    for trial in range(25):
        faults = rng.choices(FAULTS[:-1], k=rng.randint(0, 4))
        dest = tmp_path / str(trial)
        with serve({"file": DATA}, faults) as (_, url):
            try:
                assert fetch(url, dest, num_tries=8).read_bytes() == DATA
            except UserError:
                assert faults.count("flip") + faults.count("cut_no_length") >= 2 and not dest.exists()


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
