"""Sources: every URI, exact cursors, splits that never meet, and bad input named in two lines."""

import collections
import itertools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data import documents as blocks
from nanochat.data import formats, sources
from nanochat.data.documents import is_validation
from nanochat.data.sources import open_source
from nanochat.errors import UserError
from nanochat.home import Home

quick = settings(max_examples=60, deadline=None)
TEXTS = [f"document number {n}\nwith a second line {n * n}" for n in range(900)]


def write_parquet(path, texts, group=50, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path, row_group_size=group, write_page_checksum=True)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture(params=["parquet", "jsonl", "text", "directory"])
def uri(request, tmp_path, monkeypatch):
    """A source of TEXTS in every form."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", 5000)  # so that a small file has many chunks
    if request.param == "parquet":
        for shard in range(3):
            write_parquet(tmp_path / f"data/{shard}.parquet", TEXTS[300 * shard : 300 * (shard + 1)])
        return f"parquet:{tmp_path}/data"
    if request.param == "jsonl":
        (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        return f"jsonl:{tmp_path}/data.jsonl"
    if request.param == "text":
        (tmp_path / "data.txt").write_text("\n\n \n".join(TEXTS))
        return f"text:{tmp_path}/data.txt"
    (tmp_path / "many/deeper").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (tmp_path / "many" / ("deeper" if number % 2 else "") / f"{number}.txt").write_text(text)
    return f"text:{tmp_path}/many"


def take(documents, count):
    return list(itertools.islice(documents, count))


def test_every_document_once_an_epoch_in_one_split_only(uri, home):
    source = open_source(uri, home=home, seed=1)
    val = [text for text, _ in source.documents("val")]
    train = take(source.documents("train"), 2 * (len(TEXTS) - len(val)))
    first, second = train[: len(train) // 2], train[len(train) // 2 :]
    assert collections.Counter(val + [text for text, _ in first]) == collections.Counter(TEXTS)
    assert 0 < len(val) < 30 and all(map(is_validation, val))
    assert {text for text, _ in first} == {text for text, _ in second}
    assert [text for text, _ in first] != [text for text, _ in second]  # reshuffled
    assert take(open_source(uri, home=home, seed=1).documents("train"), 50) == train[:50]
    assert take(open_source(uri, home=home, seed=2).documents("train"), 50) != train[:50]


def test_a_cursor_resumes_right_after_its_document(uri, home):
    source = open_source(uri, home=home, seed=1)
    straight = take(source.documents("train"), 1000)
    for stop in (0, 1, 49, 50, 299, 600, 880, 890, 940):  # within an epoch, at its end, in the next
        cursor = json.loads(json.dumps(straight[stop][1]))
        assert take(source.documents("train", cursor), 20) == straight[stop + 1 : stop + 21]
    val = list(source.documents("val"))
    assert list(source.documents("val", val[2][1])) == val[3:]


def test_a_cursor_of_other_data_seed_or_split_is_refused(uri, home, tmp_path):
    cursor = next(open_source(uri, home=home, seed=1).documents("train"))[1]
    with pytest.raises(UserError, match="other data"):
        open_source(uri, home=home, seed=2).documents("train", cursor)
    with pytest.raises(UserError, match="other data"):
        open_source(uri, home=home, seed=1).documents("val", cursor)
    with pytest.raises(UserError, match="other data"):
        open_source("synthetic", home=home, seed=1).documents("train", cursor)
    with pytest.raises(ValueError, match="split"):
        open_source(uri, home=home, seed=1).documents("test")


def test_synthetic_is_endless_repeatable_and_split_by_index(home, monkeypatch):
    source = open_source("synthetic", home=home, seed=5)
    straight = take(source.documents("train"), 30)
    assert take(source.documents("train", straight[9][1]), 20) == straight[10:]
    assert take(open_source("synthetic", home=home, seed=6).documents("train"), 30) != straight
    monkeypatch.setattr(sources, "NUM_SYNTHETIC_VAL", 40)
    val = [cursor["next"] for _, cursor in source.documents("val")]
    train = [cursor["next"] for _, cursor in take(source.documents("train"), 40)]
    assert val == list(range(1, 41)) and train == list(range(41, 81))


def test_a_manifest_names_the_validation_shard_and_guards_the_files(home, tmp_path):
    for shard in range(3):
        write_parquet(tmp_path / f"{shard}.parquet", TEXTS[300 * shard : 300 * (shard + 1)])

    def manifest(**roles):
        shards = [{"name": f"{shard}.parquet", "role": role} for shard, role in zip("012", roles.values())]
        (tmp_path / "shards.json").write_text(json.dumps({"revision": None, "shards": shards}))

    manifest(a="train", b="val", c="train")
    source = open_source(f"parquet:{tmp_path}", home=home, seed=0)
    assert [text for text, _ in source.documents("val")] == TEXTS[300:600]
    assert {text for text, _ in take(source.documents("train"), 600)} == {*TEXTS[:300], *TEXTS[600:]}
    manifest(a="val", b="val", c="val")
    with pytest.raises(UserError, match="no train shard"):
        open_source(f"parquet:{tmp_path}", home=home, seed=0)
    manifest(a="train", b="val", c="train")
    (tmp_path / "1.parquet").unlink()  # the next file must not become validation
    with pytest.raises(UserError, match=r"1\.parquet is missing"):
        open_source(f"parquet:{tmp_path}", home=home, seed=0)
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_source(f"parquet:{tmp_path}", home=home, seed=0)


def damage(path, rng):
    data = bytearray(path.read_bytes())
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[rng.randrange(4, start)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("flips", [60, pytest.param(500, marks=pytest.mark.campaign)])
def test_a_flipped_bit_in_a_parquet_page_is_never_read_silently(home, tmp_path, flips):
    rng = random.Random(flips)
    write_parquet(tmp_path / "good.parquet", TEXTS[:200])
    expected = sorted(text for text in TEXTS[:200] if not is_validation(text))
    good = (tmp_path / "good.parquet").read_bytes()
    found = 0
    for _ in range(flips):
        (tmp_path / "bad.parquet").write_bytes(good)
        damage(tmp_path / "bad.parquet", rng)
        source = open_source(f"parquet:{tmp_path}/bad.parquet", home=home, seed=0)
        try:
            assert sorted(text for text, _ in take(source.documents("train"), len(expected))) == expected
        except UserError as error:
            assert "bad.parquet is damaged in row group" in error.problem
            found += 1
    assert found > 0.8 * flips  # the few others hit bytes that carry nothing


def test_damage_is_skipped_only_when_asked_and_told_once(home, tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    whole = open_source(f"parquet:{tmp_path}", home=home, seed=2)
    straight = [text for text, _ in take(whole.documents("train"), 4 * len(TEXTS))]
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        offset = file.metadata.row_group(7).column(0).dictionary_page_offset
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[offset + 200] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    lost = set(TEXTS[350:400])
    with pytest.raises(UserError, match=r"a\.parquet is damaged in row group 7"):
        take(open_source(f"parquet:{tmp_path}", home=home, seed=2).documents("train"), len(TEXTS))
    source = open_source(f"parquet:{tmp_path}", home=home, seed=2, damaged="skip")
    found = [text for text, _ in take(source.documents("train"), 2 * len(TEXTS))]
    assert found == [text for text in straight if text not in lost][: len(found)]
    warnings = capsys.readouterr().err
    assert warnings.count("warning: skipped") == 1 and "row group 7" in warnings
    cursor = take(source.documents("train"), 500)[-1][1]
    rest = open_source(f"parquet:{tmp_path}", home=home, seed=2, damaged="skip").documents("train", cursor)
    assert [text for text, _ in take(rest, 500)] == found[500:1000]
    with pytest.raises(UserError, match="--damaged must be one of stop, skip"):
        open_source(f"parquet:{tmp_path}", home=home, seed=2, damaged="ignore")


def test_text_that_is_no_utf8_is_damage_too(home, tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="damaged in row group 0"):
        take(open_source(f"parquet:{tmp_path}", home=home, seed=0).documents("train"), 1)


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_arrow_kind_of_text_is_read(home, tmp_path, kind):
    texts = [*TEXTS[:100], "", " \n", "\u3000\u2028", None, "é", "\u3000x", " y"]
    try:
        column = pa.array(texts, pa.string()).cast(kind)
    except pa.ArrowNotImplementedError:
        pytest.skip(f"this pyarrow does not make {kind}")
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=30)
    source = open_source(f"parquet:{tmp_path}", home=home, seed=0)
    val = [text for text, _ in source.documents("val")]
    train = [text for text, _ in take(source.documents("train"), 103 - len(val))]
    assert sorted(train + val) == sorted(text for text in texts if text and not text.isspace())
    assert all(block.array.type == pa.string() for block in source.blocks("val"))


def test_blocks_are_the_documents_and_end_at_a_size(uri, home, monkeypatch):
    source = open_source(uri, home=home, seed=1)
    documents = take(source.documents("train"), 700)
    monkeypatch.setattr(blocks, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    found = []
    for block in source.blocks("train"):
        if len(found) >= 700:
            break
        texts = block.array.to_pylist()
        assert 1 <= len(block) <= 7 and sum(map(len, texts[:-1])) < 200
        found += [(text, block.cursor(i)) for i, text in enumerate(texts)]
    assert found[:700] == documents


def test_jsonl_takes_a_glob(home, tmp_path):
    for number in range(3):
        lines = "".join(
            json.dumps({"text": text}) + "\n" for text in TEXTS[300 * number : 300 * (number + 1)]
        )
        (tmp_path / f"part-{number}.jsonl").write_text(lines)
    source = open_source(f"jsonl:{tmp_path}/part-[01].jsonl", home=home, seed=0)
    val = [text for text, _ in source.documents("val")]
    train = [text for text, _ in take(source.documents("train"), 600 - len(val))]
    assert sorted(train + val) == sorted(TEXTS[:600])


def test_lone_surrogates_become_the_replacement_character(home, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d\\ude00 b \\ud800 c"}\n' * 3)
    assert (
        next(open_source(f"jsonl:{tmp_path}/a.jsonl", home=home, seed=0).documents("train"))[0]
        == "a 😀 b � c"
    )


@quick
@given(
    st.lists(
        st.one_of(
            st.none(), st.text(st.sampled_from(" \n\t\x1c\x85\xa0\u1680\u2003\u3000aé€ｘ😀"), max_size=4)
        )
    )
)
def test_blank_documents_are_found_as_python_finds_them(texts):
    expected = [i for i, text in enumerate(texts) if text and not text.isspace()]
    assert blocks.written(pa.array(texts, pa.string())).tolist() == expected
    sliced = pa.array(["x", *texts], pa.large_string()).slice(1)
    assert blocks.written(sliced).tolist() == expected
    kept = pa.array([text or "" for text in texts], pa.string())
    assert blocks.validation_mask(kept).tolist() == [is_validation(text or "") for text in texts]


@pytest.mark.parametrize(
    ("make", "uri", "problem"),
    [
        (None, "nothing", "no data source 'nothing'"),
        (None, "synthetic:x", "no data source 'synthetic:x'"),
        (None, "parquet:", "no data source 'parquet:'"),
        (None, "parquet:{}/missing", "no parquet file at"),
        (lambda p: (p / "empty").mkdir(), "parquet:{}/empty", "no parquet file at"),
        (lambda p: (p / "empty").mkdir(), "text:{}/empty", "nothing to read at"),
        (None, "jsonl:{}/missing", "nothing to read at"),
        (None, "jsonl:{}/missing-*.jsonl", "nothing to read at"),
        (None, "tokens:{}", "there is no tokens.json in"),
        (lambda p: (p / "tokens.json").write_text('{"format": 9}'), "tokens:{}", "has format 9"),
        (lambda p: (p / "a.parquet").write_bytes(b"PAR1 no"), "parquet:{}", "cannot be read as parquet"),
        (lambda p: write_parquet(p / "a.parquet", ["x"], column="body"), "parquet:{}", "no column 'text'"),
        (lambda p: write_parquet(p / "a.parquet", []), "parquet:{}", "no train shard with rows"),
        (lambda p: (p / "a.txt").write_bytes(b"good\n\nb\xe4d"), "text:{}/a.txt", "byte 0xe4 at offset 7"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, uri, problem, home, tmp_path):
    if make:
        make(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(uri.format(tmp_path), home=home, seed=0)
    assert problem in caught.value.problem and caught.value.hint
    assert "\n" not in caught.value.problem + caught.value.hint


def test_bad_documents_are_named_when_they_are_reached(home, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"body": 1}\n')
    with pytest.raises(UserError, match="line 3: must be an object"):
        take(open_source(f"jsonl:{path}", home=home, seed=0).documents("train"), 1)
    path.write_text('{"text": " "}\n{"text": ""}\n')
    for split, word in (("train", "training"), ("val", "validation")):
        with pytest.raises(UserError, match=f"holds no document for {word}"):
            take(open_source(f"jsonl:{path}", home=home, seed=0).documents(split), 1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30), max_size=30),
    st.integers(1, 40),
)
def test_any_text_survives_any_chunking(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("any") / "a"
    path.write_bytes("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK_BYTES", size)
        chunks, _ = formats.scan(path, whole=False, blank_lines=False)
        assert [text for chunk in chunks for text in formats.split_json(chunk) if text] == [
            text for text in texts if text
        ]
        path.write_bytes("\n\n".join(texts).encode())
        chunks, _ = formats.scan(path, whole=False, blank_lines=True)
        whole, _ = formats.scan(path, whole=True, blank_lines=True)
        split = [text for chunk in chunks for text in formats.split_blocks(chunk) if text.strip()]
        assert split == [text for chunk in whole for text in formats.split_blocks(chunk) if text.strip()]
