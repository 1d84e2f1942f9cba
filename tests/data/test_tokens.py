"""Pre-tokenized shards: the batches of the text they were made from, bit for bit, and damage named."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.small_home import TOK

from nanochat.data.loader import DocumentBatches, validation_batches
from nanochat.data.sources import open_source
from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

RT = Runtime(torch.device("cpu"), torch.float32)
TEXTS = [f"text {n} of the sky, " * (1 + n * 37 % 11) for n in range(600)]


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    TOK.save(home.tokenizer_dir)
    for shard in range(3):
        path = tmp_path / f"text/{shard}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": TEXTS[200 * shard : 200 * (shard + 1)]}), path, row_group_size=50)
    return home


def make(home, out="tokens", *more):
    from scripts import tok_shards

    arguments = [
        f"--home={home.root}",
        f"--data=parquet:{home.root.parent}/text",
        f"--out={home.root.parent / out}",
    ]
    tok_shards.main([*arguments, "--threads=1", *more])
    return f"tokens:{home.root.parent / out}"


def rows(uri, home, count=12, cursor=None, tok=TOK):
    source = open_source(uri, home=home, seed=4)
    with DocumentBatches(source, tok, sequence_len=64, device_batch=4, rt=RT, cursor=cursor) as batches:
        return [(b.inputs_BT.tolist(), b.cursor) for b in itertools.islice(batches, count)]


def test_the_same_batches_as_from_text(home, capsys):
    tokens, text = make(home), f"parquet:{home.root.parent}/text"
    assert [row for row, _ in rows(tokens, home, 80)] == [
        row for row, _ in rows(text, home, 80)
    ]  # two epochs
    made = [
        [b.targets_BT.tolist() for b in validation_batches(
            open_source(uri, home=home, seed=4), TOK, sequence_len=64, device_batch=4, rt=RT, num_rows=9)]
        for uri in (tokens, text)
    ]  # fmt: skip
    assert made[0] == made[1]
    facts = json.loads((home.root.parent / "tokens/tokens.json").read_text())
    assert facts["documents"] == 600 and facts["text_bytes"] == sum(map(len, TEXTS))
    assert facts["tokens"] == 600 + sum(len(TOK.encode(text)) for text in TEXTS)
    make(home)
    assert "already finished" in capsys.readouterr().out


def test_resume_is_exact_and_shards_may_be_small(home):
    uri = make(home, "many", "--shard-mb=0")
    assert len(list((home.root.parent / "many").glob("train-*.parquet"))) == 12
    straight = rows(uri, home, 20)
    assert [row for row, _ in rows(uri, home, 9, straight[10][1])] == [row for row, _ in straight[11:]]


def test_another_tokenizer_damage_and_leftovers_are_refused(home):
    uri = make(home)
    other = RustBPETokenizer.train_from_iterator(["another text entirely"], 270)
    with pytest.raises(UserError, match="were made with another tokenizer"):
        rows(uri, home, tok=other)
    with pytest.raises(UserError, match="holds tokens, not text"):
        open_source(uri, home=home, seed=0).documents("train")
    other.save(home.tokenizer_dir)
    with pytest.raises(UserError, match="of another source or tokenizer"):
        make(home)
    shard = home.root.parent / "tokens/train-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000\.parquet is damaged in row group 0"):
        rows(uri, home, 40)
    shard.unlink()
    with pytest.raises(UserError, match="missing, but listed"):
        rows(uri, home)


def test_no_validation_is_told_and_never_taken_from_training(home, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": TEXTS[3]}) + "\n")
    from scripts import tok_shards

    tok_shards.main([f"--home={home.root}", f"--data=jsonl:{tmp_path}/one.jsonl", f"--out={tmp_path}/few"])
    with pytest.raises(UserError, match="holds no document for validation"):
        next(open_source(f"tokens:{tmp_path}/few", home=home, seed=0).blocks("val"))
    for data in ("synthetic", f"tokens:{tmp_path}/few"):
        with pytest.raises(UserError, match="has no end, or no text"):
            tok_shards.main([f"--home={home.root}", f"--data={data}", f"--out={tmp_path}/none"])
