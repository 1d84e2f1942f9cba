"""Hub and mirror: verified bytes or none, a manifest that remembers, offline without a socket."""

import hashlib
import json
import socket
import time
from functools import partial

import pytest
from helpers.faulty_server import FAULTS, serve
from helpers.hub_files import FILES, MIRROR, NAME, SHARDS, api, parquet

from nanochat import errors
from nanochat.data.download import hub
from nanochat.data.download import hub_client as contact
from nanochat.data.download.progress import Progress
from nanochat.data.sources import open_source
from nanochat.errors import UserError
from nanochat.home import Home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_MIRROR", raising=False)
    monkeypatch.setattr(
        "nanochat.data.download.transfer.random.uniform", lambda *_: 0.001
    )  # waits of milliseconds
    return Home(tmp_path / "home")


@pytest.fixture
def mirror_dir(tmp_path):
    for name, data in MIRROR.items():
        path = tmp_path / "mirror" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "mirror"


def contents(directory, entries):
    return {entry["name"]: (directory / entry["name"]).read_bytes() for entry in entries}


def expected(*names):
    return {name: FILES[f"datasets/{NAME}/{name}"] for name in names}


def test_a_mirror_url_gives_verified_shards_and_a_manifest(home):
    with serve(MIRROR) as (server, url):
        directory, entries = hub.fetch_shards(NAME, home=home, num_shards=2, mirror=url)
        assert contents(directory, entries) == expected(*SHARDS[:2], SHARDS[3])
        asked = len(server.requests)
        hub.fetch_shards(NAME, home=home, num_shards=2, mirror=url)
        assert len(server.requests) == asked  # nothing is asked twice
    manifest = hub.read_manifest(directory)
    assert manifest["revision"] is None
    shards = {entry["name"]: entry for entry in manifest["shards"]}
    assert [name for name, entry in shards.items() if entry["role"] == "val"] == ["shard_06542.parquet"]
    assert shards[SHARDS[0]]["rows"] == 30 and shards[SHARDS[0]]["row_groups"] == 3
    assert shards[SHARDS[2]]["rows"] is None and not shards[SHARDS[2]]["verified"]


def test_shards_arrive_whole_from_a_faulty_mirror(home):
    faults = [None, "cut", "503", "drop", "flip", "cut_no_length", "500", "cut_chunked"]
    with serve(MIRROR, faults) as (_, url):
        directory, entries = hub.fetch_shards(NAME, home=home, mirror=url)
    assert contents(directory, entries) == expected(*SHARDS)


def test_a_mirror_that_holds_other_bytes_than_it_says_is_refused(home, mirror_dir):
    (mirror_dir / "datasets" / NAME / SHARDS[1]).write_bytes(parquet(77))
    with pytest.raises(UserError, match="does not agree with its recorded size and hash"):
        hub.fetch_shards(NAME, home=home, mirror=str(mirror_dir))
    assert not list(home.data_dir.rglob(SHARDS[1]))
    wrong = MIRROR | {f"datasets/{NAME}/{SHARDS[1]}": parquet(77)}
    with serve(wrong) as (_, url), pytest.raises(UserError, match="does not have the hash"):
        hub.fetch_shards(NAME, home=home, mirror=url)
    assert not list(home.data_dir.rglob(SHARDS[1]))


def test_a_mirror_directory_without_checksums_is_recorded_at_first_contact(home, mirror_dir):
    (mirror_dir / "SHA256SUMS").unlink()
    directory, entries = hub.fetch_shards(NAME, home=home, num_shards=1, mirror=str(mirror_dir))
    assert entries[0]["sha256"] == hashlib.sha256(expected(SHARDS[0])[SHARDS[0]]).hexdigest()
    (directory / SHARDS[0]).unlink()
    (mirror_dir / "datasets" / NAME / SHARDS[0]).write_bytes(parquet(77))
    with pytest.raises(UserError, match="does not agree"):
        hub.fetch_shards(NAME, home=home, num_shards=1, mirror=str(mirror_dir))


def test_the_hub_itself_revision_recorded_and_content_checked(home, monkeypatch):
    with serve(FILES, api=api()) as (server, url):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        directory, entries = hub.fetch_shards(NAME, home=home, num_shards=1)
        assert contents(directory, entries) == expected(SHARDS[0], SHARDS[3])
        assert hub.read_manifest(directory)["revision"] == "c" * 40
        monkeypatch.setattr(hub, "RESERVED_BYTES", 1 << 60)
        with pytest.raises(UserError, match="GB of disk are free"):
            hub.fetch_shards(NAME, home, num_shards=2)
        monkeypatch.setattr(hub, "RESERVED_BYTES", 0)
        assert hub.dataset_files(NAME, "README.md", home=home)[0].read_bytes() == b"a card"
        server.files[f"datasets/{NAME}/{SHARDS[1]}"] = parquet(77)
        with pytest.raises(UserError, match=r"1 of 3 files were not fetched, shard_00001.*have the hash"):
            hub.fetch_shards(NAME, home=home, num_shards=2)
        assert not (directory / SHARDS[1]).exists()
        server.files[f"datasets/{NAME}/{SHARDS[1]}"] = FILES[f"datasets/{NAME}/{SHARDS[1]}"]
        server.faults[:] = ["flip"]
        directory, entries = hub.fetch_shards(NAME, home=home, num_shards=2)
        assert contents(directory, entries) == expected(*SHARDS[:2], SHARDS[3])
        pinned, _ = hub.fetch_shards(f"{NAME}@{'c' * 40}", home=home, num_shards=1)
        assert pinned != directory


@pytest.mark.parametrize("fault", FAULTS)
def test_the_hub_itself_with_every_fault(home, monkeypatch, fault):
    true_fetch = contact.fetch_url
    monkeypatch.setattr(contact, "fetch_url", partial(true_fetch, stall_seconds=0.3))
    monkeypatch.setattr(contact, "LIST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(FILES, [fault], api=api()) as (server, url):
        server.api_faults = [fault] if fault in ("429", "500", "503", "drop") else []
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        directory, entries = hub.fetch_shards(NAME, home=home, num_shards=1)
        assert contents(directory, entries) == expected(SHARDS[0], SHARDS[3])
        assert {host for host, token in server.tokens if token} == {url.removeprefix("http://")}
    assert not list(directory.rglob("*.part")) and not server.faults


def test_a_name_the_hub_does_not_know_is_told_at_once(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve({}) as (server, url):
        server.api_faults = ["404"] * 9
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(UserError, match="the hub does not list owner/none"):
            hub.fetch_shards("owner/none", home=home)
        assert len(server.requests) == 1


def test_all_that_failed_is_told_and_all_else_is_there(home, mirror_dir):
    for name in SHARDS[:2]:
        (mirror_dir / "datasets" / NAME / name).unlink()
    with pytest.raises(UserError) as caught:
        hub.fetch_shards(NAME, home=home, mirror=str(mirror_dir))
    assert "2 of 4 files were not fetched, shard_00000.parquet, shard_00001.parquet" in caught.value.problem
    assert {path.name for path in home.data_dir.rglob("*.parquet")} == set(SHARDS[2:])


def test_ctrl_c_ends_a_fetch_soon_and_keeps_what_arrived(home, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_failures", interrupt)
    start = time.monotonic()
    with serve(MIRROR, ["503"] * 40) as (_, url):
        monkeypatch.setattr("nanochat.data.download.transfer.random.uniform", lambda *_: 60.0)
        server_url = url
        monkeypatch.setattr(contact, "_list_mirror", lambda repo: [{"name": name} for name in SHARDS])
        with pytest.raises(KeyboardInterrupt):
            hub.fetch_shards(NAME, home=home, mirror=server_url)
    assert time.monotonic() - start < 5


def test_progress_counts_in_plain_lines(home, mirror_dir, capsys):
    hub.fetch_shards(NAME, home=home, mirror=str(mirror_dir))
    assert f"fetching {NAME}: 4 of 4 files" in capsys.readouterr().out
    with Progress("x", 2, 10_000_000) as progress:
        progress.advance(5_000_000)
        progress.advance(-1_000_000)
        progress.file_done()
        assert progress.line().startswith("1 of 2 files, 4.0 of 10.0 MB, ")


def test_offline_opens_no_socket(home, mirror_dir, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    with serve(MIRROR) as (_, url):
        hub.fetch_shards(NAME, home=home, num_shards=1, mirror=url)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    source = open_source(f"hub:{NAME}", home=home, seed=0, num_shards=1, mirror=url, offline=True)
    assert next(source.documents("val"))[0].startswith("document 3000")
    with pytest.raises(UserError, match="--offline forbids"):
        hub.fetch_shards(NAME, home=home, num_shards=2, mirror=url, offline=True)
    with pytest.raises(UserError, match="--offline forbids"):
        hub.dataset_files("openai/gsm8k", "*", home=home, offline=True)
    directory, entries = hub.fetch_shards(NAME, home=home, mirror=str(mirror_dir), offline=True)
    assert contents(directory, entries) == expected(*SHARDS)


def test_verify_finds_damage_and_the_next_fetch_repairs_it(home, mirror_dir):
    repo = hub.open_repo(NAME, home, str(mirror_dir))
    directory, entries = hub.fetch_shards(NAME, home=home, mirror=str(mirror_dir))
    assert hub.verify(repo) == []
    damaged = bytearray((directory / SHARDS[0]).read_bytes())
    damaged[100] ^= 1
    (directory / SHARDS[0]).write_bytes(damaged)
    (directory / SHARDS[2]).unlink()
    assert hub.verify(repo) == [SHARDS[0], SHARDS[2]]
    assert (directory / f"corrupt-{SHARDS[0]}").exists()
    directory, entries = hub.fetch_shards(NAME, home=home, mirror=str(mirror_dir))
    assert contents(directory, entries) == expected(*SHARDS) and hub.verify(repo) == []


def test_plain_files_from_a_mirror_packed_or_not(home, mirror_dir):
    import gzip

    (mirror_dir / "words").mkdir()
    (mirror_dir / "words/words_alpha.txt.gz").write_bytes(gzip.compress(b"a\r\nb\r\n"))
    (mirror_dir / "eval_bundle.zip").write_bytes(b"zip")
    sums = [
        (name, (mirror_dir / name).read_bytes()) for name in ("eval_bundle.zip", "words/words_alpha.txt.gz")
    ]
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sums)
    (mirror_dir / "SHA256SUMS").write_text(lines)
    assert (
        hub.plain_file("words/words_alpha.txt", home=home, mirror=str(mirror_dir)).read_bytes()
        == b"a\r\nb\r\n"
    )
    assert hub.plain_file("eval_bundle.zip", home=home, mirror=str(mirror_dir)).read_bytes() == b"zip"


def test_plain_files_from_their_addresses(home, monkeypatch):
    with serve({"bundle": b"zip"}) as (server, url):
        monkeypatch.setattr(contact, "PLAIN_URLS", {"eval_bundle.zip": f"{url}/bundle"})
        path = hub.plain_file("eval_bundle.zip", home=home)
        assert path.read_bytes() == b"zip"
        path.unlink()
        server.files["bundle"] = b"new"  # the first contact's hash is enforced from then on
        with pytest.raises(UserError, match="does not have the hash"):
            hub.plain_file("eval_bundle.zip", home=home)


def test_names_that_cannot_be(home, mirror_dir):
    for name in ("climbmix", "../x/y", "a/b/c", "a/.."):
        with pytest.raises(UserError, match="OWNER/NAME"):
            hub.open_repo(name, home)
    with pytest.raises(UserError, match="no file that matches"):
        hub.dataset_files(NAME, "*.csv", home=home, mirror=str(mirror_dir))
    with pytest.raises(UserError, match="3 training files"):
        hub.fetch_shards(NAME, home=home, num_shards=9, mirror=str(mirror_dir))
    with pytest.raises(UserError, match="not a directory"):
        hub.fetch_shards(NAME, home=home, mirror="/nowhere/at/all")
    directory = home.data_dir / "x"
    directory.mkdir(parents=True)
    for entry in ({"name": "../../etc/passwd", "role": "train"}, {"name": "a", "role": "test"}, {}, []):
        (directory / hub.MANIFEST).write_text(json.dumps({"shards": [entry]}))
        with pytest.raises(UserError, match="is not a manifest"):
            hub.read_manifest(directory)


def test_the_script_fails_unless_everything_is_there_and_right(home, mirror_dir, capsys):
    from scripts import data

    arguments = [f"--home={home.root}", f"--source=hub:{NAME}", f"--mirror={mirror_dir}"]
    (mirror_dir / "datasets" / NAME / SHARDS[1]).write_bytes(b"PAR1")
    assert errors.run(data.main, [*arguments, "--shards=3"]) == 2
    assert "1 of 4 files were not fetched, shard_00001.parquet" in capsys.readouterr().err
    assert errors.run(data.main, [*arguments, "--shards=1"]) == 0
    assert errors.run(data.main, [*arguments, "--shards=2", "--offline"]) == 2


def test_the_script_fetches_verifies_and_reports(home, mirror_dir, capsys):
    from scripts import data

    def run(*extra):
        data.main(
            [f"--home={home.root}", f"--source=hub:{NAME}", f"--mirror={mirror_dir}", "--shards=2", *extra]
        )
        return capsys.readouterr().out

    assert "3 shards" in run() and "90 documents" in run()
    shard = next(home.data_dir.rglob(SHARDS[0]))
    shard.write_bytes(b"x" * shard.stat().st_size)
    assert "1 damaged or missing shard_00000.parquet" in run("--verify", "--offline")
    assert "0 damaged" in run("--verify") and "train: 60 documents\nval: 30 documents" in run("--verify")
