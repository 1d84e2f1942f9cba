"""hf:OWNER/NAME: which files are a split, which rows are conversations, errors that say what is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.faulty_server import serve

from nanochat.errors import UserError
from nanochat.home import Home
from tasks.base import reference
from tasks.hubchat import HubChat, files_of_split

SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


def talk(number: int, system: bool = False) -> list[dict[str, str]]:
    first = [{"role": "system", "content": "Be kind."}] if system else []
    return [*first, {"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": str(number)}]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call with the files of us/chats to put them on a mirror of one's own."""
    monkeypatch.setenv("NANOCHAT_MIRROR", str(tmp_path / "mirror"))

    def put(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = tmp_path / "mirror" / "datasets" / "us" / "chats" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return put


def said(task: HubChat) -> list[int]:
    return sorted(int(reference(task[i])) for i in range(len(task)))


@pytest.mark.parametrize(
    ("names", "config", "split", "wanted"),
    [
        ([*SHARDS, "data/test-00000-of-00001.parquet", "README.md"], "", "train", SHARDS),
        (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], "", "train_sft",
         ["data/train_sft-00000-of-00001.parquet"]),
        (["all/train-0.parquet", "some/train-0.parquet"], "some", "train", ["some/train-0.parquet"]),
        (["data/all/train-0.parquet", "data/some/train-0.parquet"], "all", "train",
         ["data/all/train-0.parquet"]),
        (["train/0.parquet", "test/0.parquet"], "", "test", ["test/0.parquet"]),
        (["chats_train_v2.jsonl", "chats_test_v2.jsonl"], "", "train", ["chats_train_v2.jsonl"]),
        (["everything.jsonl"], "", "train", ["everything.jsonl"]),
        (["train.jsonl", "data/train-0.parquet"], "", "train", ["data/train-0.parquet"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(names: list[str], config: str, split: str, wanted: list[str]) -> None:
    assert files_of_split(names, config, split) == wanted


@pytest.mark.parametrize(
    ("names", "config", "split", "problem"),
    [
        (["README.md", "train.csv"], "", "train", "no file ends with .parquet or .jsonl; found README.md"),
        (SHARDS, "", "dev", "no file is of any:dev; found data/train-00000"),
        (SHARDS, "other", "train", "no file is of other:train"),
        (["trainer.jsonl", "constrain.jsonl"], "", "train", "no file is of any:train"),
        (["a/train-0.parquet", "b/train-0.parquet"], "", "train", "several configurations: a, b; name one"),
    ],
)
def test_no_files_of_a_split(names: list[str], config: str, split: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        files_of_split(names, config, split)


def test_conversations_of_several_parquet_files(mirror: Callable[..., None], home: Path) -> None:
    """Other columns and other fields of a message do not matter; a system message stays."""
    rows = [{"messages": [m | {"id": 1} for m in talk(i, i % 2 == 0)], "source": "us"} for i in range(40)]
    mirror({SHARDS[0]: parquet(rows[:25]), SHARDS[1]: parquet(rows[25:]), "README.md": b"a card"})
    task = HubChat("hf:us/chats", Home(home))
    assert said(task) == list(range(40)) and task.num_left_out == 0
    assert [reference(task[i]) for i in range(40)] != [str(i) for i in range(40)], "shuffled"
    first = next(c for c in (task[i] for i in range(40)) if reference(c) == "2")
    assert first == {"messages": talk(2, True)}
    assert [task[i] for i in range(40)] == [HubChat("hf:us/chats", Home(home / "b"))[i] for i in range(40)]
    assert len(HubChat("hf:us/chats", Home(home), start=10, stop=30)) == 20


def test_json_lines_and_a_configuration(mirror: Callable[..., None], home: Path) -> None:
    rows = [{"messages": talk(i), "n": i} for i in range(5)]
    mirror({"a/train.jsonl": jsonl(rows), "a/test.jsonl": jsonl(rows[:2]), "b/train.jsonl": jsonl(rows[:1])})
    assert said(HubChat("hf:us/chats:a", Home(home))) == list(range(5))
    assert said(HubChat("hf:us/chats:a:test", Home(home))) == [0, 1]
    with pytest.raises(UserError, match="several configurations: a, b; name one"):
        len(HubChat("hf:us/chats", Home(home)))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_column_that_is_missing_is_named_with_those_there_are(
    mirror: Callable[..., None], home: Path, suffix: str
) -> None:
    rows = [{"prompt": "a", "response": "b"}]
    mirror({f"train.{suffix}": (parquet if suffix == "parquet" else jsonl)(rows)})
    with pytest.raises(UserError, match=f"train.{suffix} has no column 'messages'; it has prompt, response"):
        len(HubChat("hf:us/chats", Home(home)))


BAD = (
    [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
    [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    [{"role": "user", "content": "a"}],
    [],
    None,
)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rows_that_are_no_conversations(
    mirror: Callable[..., None], home: Path, bad: Any, suffix: str
) -> None:
    """Up to one in a hundred is left out and counted, more are an error that names the first."""
    write = parquet if suffix == "parquet" else jsonl
    rows = [{"messages": talk(i)} for i in range(198)]
    mirror({f"few/train.{suffix}": write([*rows[:3], {"messages": bad}, *rows[3:]])})
    mirror({f"many/train.{suffix}": write([*rows[:3], {"messages": bad}, *rows[3:60]])})
    task = HubChat("hf:us/chats:few", Home(home))
    assert said(task) == list(range(198)) and task.num_left_out == 1
    with pytest.raises(UserError, match="1 of 61 rows are no conversations; the first is row 3: ") as caught:
        len(HubChat("hf:us/chats:many", Home(home)))
    assert "roles must be" in caught.value.hint


def test_lines_that_are_no_json(mirror: Callable[..., None], home: Path) -> None:
    mirror({"train.jsonl": jsonl([{"messages": talk(1)}]) + b"{\n"})
    with pytest.raises(UserError, match=r"train.jsonl line 2: not JSON"):
        len(HubChat("hf:us/chats", Home(home)))


@pytest.mark.parametrize("spec", ["hf:", "hf:chats", "us/chats", "hf:us/chats:a:b:c"])
def test_names_that_are_none(spec: str) -> None:
    with pytest.raises(UserError, match="hf:OWNER/NAME"):
        HubChat(spec)


def files_and_sums() -> dict[str, bytes]:
    files = {f"datasets/us/chats/{name}": parquet([{"messages": talk(i)} for i in range(n, n + 300)])
             for n, name in ((0, SHARDS[0]), (300, SHARDS[1]))}  # fmt: skip
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    return files | {"SHA256SUMS": sums.encode()}


def test_whole_through_a_faulty_mirror(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, flipped and refused on the way: the rows are those that were served; damage on disk is mended."""
    monkeypatch.setattr("nanochat.data.download.transfer.random.uniform", lambda *_: 0.001)
    with serve(files_and_sums(), [None, "cut", "503", "flip", "drop"]) as (_, url):
        monkeypatch.setenv("NANOCHAT_MIRROR", url)
        assert said(HubChat("hf:us/chats", Home(home))) == list(range(600))
        (path,) = Home(home).data_dir.rglob(Path(SHARDS[1]).name)
        path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
        assert said(HubChat("hf:us/chats", Home(home))) == list(range(600))


def test_through_the_hub_with_a_revision(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_and_sums()
    siblings = [
        {
            "rfilename": name.removeprefix("datasets/us/chats/"), "size": len(data),
            "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1},
        }
        for name, data in files.items() if name.endswith(".parquet")
    ]  # fmt: skip
    listing = {"id": "us/chats", "sha": "c" * 40, "siblings": siblings}
    monkeypatch.delenv("NANOCHAT_MIRROR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(files, api=listing) as (server, url):
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert said(HubChat("hf:us/chats@v1", Home(home))) == list(range(600))
        assert any("/revision/v1" in name for _, name, _ in server.requests)
