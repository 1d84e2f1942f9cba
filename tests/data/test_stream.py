"""Shards that arrive while they are read: one order whatever arrives when, a bound on disk, nothing lost."""

import itertools
import json
import threading
import time

import pytest
import torch
from helpers.faulty_server import serve
from helpers.hub_files import FILES, MIRROR, NAME, SHARDS
from helpers.small_home import TOK

from nanochat.data.download import hub, stream
from nanochat.data.loader import DocumentBatches
from nanochat.data.sources import open_source
from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.runtime import Runtime

SIZE = max(len(data) for name, data in FILES.items() if name.endswith(".parquet"))
URI = f"hub:{NAME}"
EPOCH = 90  # documents of the three training shards


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_MIRROR", raising=False)
    monkeypatch.setattr("nanochat.data.download.transfer.random.uniform", lambda *_: 0.001)
    return Home(tmp_path / "home")


def read(home, url, count, cursor=None, **options):
    source = open_source(URI, home=home, seed=5, mirror=url, **options)
    return list(itertools.islice(source.documents("train", cursor), count))


def on_disk(home):
    return {path.name for path in home.data_dir.rglob("shard_*.parquet")}


@pytest.fixture
def straight(tmp_path):
    with serve(MIRROR) as (_, url):
        return [text for text, _ in read(Home(tmp_path / "other"), url, 3 * EPOCH)]


def test_every_epoch_has_each_document_once_and_keeps_the_shards_together(straight):
    for epoch in range(3):
        part = straight[epoch * EPOCH : (epoch + 1) * EPOCH]
        assert len(set(part)) == EPOCH
        shards = [int(text.split()[1]) // 1000 for text in part]
        assert sum(one != other for one, other in itertools.pairwise(shards)) == 2
    assert straight[:EPOCH] != straight[EPOCH : 2 * EPOCH]


def test_training_starts_with_the_first_shard(home, straight, monkeypatch):
    started, true_fetch = threading.Event(), hub.fetch_one
    last = SHARDS[int(straight[EPOCH - 1].split()[1]) // 1000]  # of the first epoch

    def fetch(repo, name, stop=None):
        assert name != last or started.wait(10)
        return true_fetch(repo, name, stop)

    monkeypatch.setattr(hub, "fetch_one", fetch)
    with serve(MIRROR) as (_, url):
        documents = open_source(URI, home=home, seed=5, mirror=url).documents("train")
        assert on_disk(home) == {"shard_06542.parquet"}  # only validation is fetched beforehand
        assert [text for text, _ in itertools.islice(documents, 60)] == straight[:60]
        assert last not in on_disk(home)
        started.set()
        assert [text for text, _ in itertools.islice(documents, 60)] == straight[60:120]


def test_a_bound_on_disk_changes_nothing_but_the_disk(home, straight, monkeypatch):
    monkeypatch.setattr("nanochat.data.download.stream.LEAST_SHARDS", 2)
    most, keep = 0, 2.5 * SIZE
    with serve(MIRROR) as (server, url):
        source = open_source(URI, home=home, seed=5, mirror=url, disk_gb=keep / 1e9)
        found = []
        for text, _ in itertools.islice(source.documents("train"), 3 * EPOCH):
            found.append(text)
            most = max(most, len(on_disk(home) - {"shard_06542.parquet"}))
        fetched = [name for method, name, _ in server.requests if method == "GET" and "shard_0000" in name]
    assert found == straight and most == 2 and len(fetched) > 3
    assert hub.verify(hub.open_repo(NAME, home, url)) == []


def test_a_bound_that_cannot_hold_what_is_in_use_is_refused(home):
    with serve(MIRROR) as (_, url), pytest.raises(UserError, match="do not hold 3 shards"):
        read(home, url, EPOCH, disk_gb=1.5 * SIZE / 1e9)


@pytest.mark.parametrize("stop", [1, 29, 30, 31, 89, 90, 91, 200])
def test_resume_after_any_document_also_where_nothing_was_kept(home, straight, stop):
    with serve(MIRROR) as (_, url):
        cursor = json.loads(json.dumps(read(home, url, stop)[-1][1]))
        for path in home.data_dir.rglob("shard_0000*.parquet"):
            path.unlink()
        rest = read(home, url, 3 * EPOCH - stop, cursor)
    assert [text for text, _ in rest] == straight[stop:]


def test_faults_while_training_change_nothing(home, straight):
    faults = [None, None, "cut", "503", "drop", "flip", "cut_no_length", "500", "429", "cut_chunked"]
    with serve(MIRROR, faults) as (server, url):
        assert [text for text, _ in read(home, url, 3 * EPOCH)] == straight
        assert not server.faults


def test_a_shard_damaged_on_disk_is_fetched_once_more(home, straight, capsys):
    with serve(MIRROR) as (_, url):
        read(home, url, 3 * EPOCH)
        for path in home.data_dir.rglob("shard_00001.parquet"):
            data = bytearray(path.read_bytes())
            data[60] ^= 4
            path.write_bytes(data)
        assert [text for text, _ in read(home, url, 3 * EPOCH)] == straight
        assert "shard_00001.parquet is damaged in row group 0" in capsys.readouterr().err
        assert list(home.data_dir.rglob("corrupt-shard_00001.parquet"))


def test_damage_that_fetching_does_not_mend_stops_the_run(home, straight):
    with serve(MIRROR) as (server, url):
        read(home, url, 3 * EPOCH)
        path = next(home.data_dir.rglob("shard_00001.parquet"))
        path.write_bytes(bytes(reversed(path.read_bytes())))
        server.files[f"datasets/{NAME}/{SHARDS[1]}"] = b"gone bad there, too"
        with pytest.raises(UserError, match=r"does not have the hash|cannot be read"):
            read(home, url, 3 * EPOCH)


def test_two_processes_in_one_directory_do_not_hinder_each_other(home, straight, monkeypatch):
    monkeypatch.setattr("nanochat.data.download.stream.LEAST_SHARDS", 2)
    with serve(MIRROR) as (_, url):
        options = {"home": home, "seed": 5, "mirror": url, "disk_gb": 2.5 * SIZE / 1e9}
        one, other = (open_source(URI, **options).documents("train") for _ in range(2))
        found = ([], [])
        for _ in range(3 * EPOCH // 45):  # the second is always half a shard behind
            found[0].extend(text for text, _ in itertools.islice(one, 45))
            found[1].extend(text for text, _ in itertools.islice(other, 45))
    assert found[0] == found[1] == straight


def test_closing_a_loader_that_waits_for_a_shard_takes_no_time(home, monkeypatch):
    monkeypatch.setattr("nanochat.data.download.transfer.random.uniform", lambda *_: 50.0)
    with serve(MIRROR, [None, None, *["503"] * 40]) as (server, url):
        server.retry_after = {"503": "50"}
        source = open_source(URI, home=home, seed=5, mirror=url)
        rt = Runtime(torch.device("cpu"), torch.float32)
        batches = DocumentBatches(source, TOK, sequence_len=16, device_batch=1, rt=rt)
        while len(server.faults) > 37:  # all three are waiting
            time.sleep(0.01)
        start = time.monotonic()
        batches.close()
        assert time.monotonic() - start < 3


def test_a_shard_that_another_process_evicts_is_fetched_again(home, straight, monkeypatch):
    true_chunks, evicted = stream.parquet_chunks, []

    def chunks(path, *rest):
        if path.name not in evicted and "0654" not in path.name:
            evicted.append(path.name)
            path.unlink(missing_ok=True)  # between the fetch and the look at it
        return true_chunks(path, *rest)

    monkeypatch.setattr(stream, "parquet_chunks", chunks)
    with serve(MIRROR) as (_, url):
        source = open_source(URI, home=home, seed=5, mirror=url)
        found = []
        for number, (text, _) in enumerate(itertools.islice(source.documents("train"), 2 * EPOCH)):
            found.append(text)
            if number % 35 == 0:  # and between two looks
                for path in home.data_dir.rglob("shard_0000*.parquet"):
                    path.unlink(missing_ok=True)
    assert found == straight[: 2 * EPOCH] and len(evicted) == 3
