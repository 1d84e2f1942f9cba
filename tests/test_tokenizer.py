"""RustBPETokenizer: ids, special tokens, files, and the two scripts that train and measure it."""

from __future__ import annotations

import itertools
import json
import threading
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

import rustbpe
from nanochat import chat_format as chat
from nanochat import tokenizer
from nanochat.data.sources import open_source
from nanochat.errors import UserError
from nanochat.home import Home, read_json
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts import tok_eval, tok_shards, tok_train

CORPUS = ["the cat sat on the mat, 1234 times; naïve 東京 🎈\n" * 4, "def f(x):\n    return x + 1\n" * 4]


@pytest.fixture(scope="module")
def tok() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(CORPUS), 300)


def test_sizes_and_special_ids(tok: RustBPETokenizer) -> None:
    assert tok.get_vocab_size() == 300
    assert tok.get_special_tokens() == SPECIAL_TOKENS and len(SPECIAL_TOKENS) == 9
    assert [tok.encode_special(name) for name in SPECIAL_TOKENS] == list(range(291, 300))
    assert tok.get_bos_token_id() == 291 and tok.id_to_token(291) == "<|bos|>"
    with pytest.raises(ValueError, match="special tokens are"):
        tok.encode_special("<|nope|>")
    with pytest.raises(ValueError, match="at least 265"):
        RustBPETokenizer.train_from_iterator(iter(CORPUS), 264)


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    tok = RustBPETokenizer.train_from_iterator(iter(["ab"]), 1000)
    assert tok.get_vocab_size() == 257 + 9 and tok.get_bos_token_id() == 257


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(SPECIAL_TOKENS)


@given(st.lists(words, max_size=5).map("".join))
def test_text_comes_back_and_never_becomes_special(tok: RustBPETokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text and max(ids, default=0) < 291
    assert sum(tok.token_bytes()[ids]) == len(text.encode()) == len(tok.decode_bytes(ids))


def test_lists_prepend_append(tok: RustBPETokenizer) -> None:
    texts = ["the cat", "", "x + 1"]
    plain = [tok.encode(text) for text in texts]
    assert tok.encode(texts) == tok(texts, num_threads=2) == plain
    both = [[291, *ids, 295] for ids in plain]
    assert tok.encode(texts, prepend="<|bos|>", append=295) == both
    assert tok("the cat", prepend=291, append="<|assistant_end|>") == both[0]
    arrays = tok.encode_arrays(texts, prepend="<|bos|>")
    assert [array.tolist() for array in arrays] == [[291, *ids] for ids in plain]
    assert all(array.dtype == np.int32 for array in [*arrays, *tok.encode_arrays(texts)])
    assert [array.tolist() for array in tok.encode_arrays(texts)] == plain and tok.encode_arrays([]) == []
    for wrong in (b"bytes", [1], ("a",), None):
        with pytest.raises(TypeError, match="must be a str or a list of str"):
            tok.encode(wrong)  # type: ignore[call-overload]


def test_arrow(tok: RustBPETokenizer) -> None:
    texts = ["the cat", None, "", "x + 1 東"]
    expected = [[] if text is None else [291, *tok.encode(text)] for text in texts]
    tokens, offsets = tok.encode_arrow(pa.array(texts), prepend="<|bos|>")
    assert np.split(tokens, offsets[1:-1])[1].size == 0 and tokens.dtype == tok.token_dtype() == np.uint16
    assert [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected
    ranks = tok.get_mergeable_ranks()
    wide = RustBPETokenizer(ranks, tok.get_pattern(), {"<|bos|>": 65536})
    assert wide.encode_arrow(pa.array(["a"]))[0].dtype == np.int32  # by the vocabulary, whatever the text is


def test_lone_surrogates_become_replacement_characters(tok: RustBPETokenizer) -> None:
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.decode(tok.encode(["\ud83d\ude00"])[0]) == "😀"  # the two halves of one character
    assert RustBPETokenizer.train_from_iterator(iter(["\ud800 \ud800"]), 300).get_vocab_size() > 265
    broken = {"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "ok"}]}
    assert "\ufffd" in tok.decode(tok.render_conversation(broken)[0])


def test_decoding(tok: RustBPETokenizer) -> None:
    euro = tok.encode("€")
    assert tok.decode(euro[:1]) == "\ufffd" and tok.decode_bytes(euro[:1]) == b"\xe2"
    assert tok.decode([291, *euro]) == "<|bos|>€"
    assert tok.decode(np.array(euro)) == "€"  # type: ignore[arg-type]
    for wrong in ([300], [-1]):
        with pytest.raises(ValueError, match="below 300"):
            tok.decode(wrong)


def test_token_bytes_are_raw_lengths(tok: RustBPETokenizer) -> None:
    lengths = tok.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (300,) and not lengths[291:].any()
    assert [len(token) for token, _ in tok.get_mergeable_ranks()] == lengths[:291].tolist()
    assert lengths[0x80] == 1  # half a character is one byte, not the three of U+FFFD


def test_save_and_load(tok: RustBPETokenizer, tmp_path: Path) -> None:
    path = tok.save(tmp_path)
    again = RustBPETokenizer.from_directory(tmp_path)
    assert path.name == "tokenizer.json" and again.fingerprint() == tok.fingerprint()
    assert again.encode(CORPUS) == tok.encode(CORPUS) and again.get_special_tokens() == SPECIAL_TOKENS
    assert read_json(path)["ranks"][:291] == [
        token.decode("latin-1") for token, _ in tok.get_mergeable_ranks()
    ]
    other = RustBPETokenizer(
        tok.get_mergeable_ranks(), tok.get_pattern() + "|x", dict.fromkeys(["<|bos|>"], 291)
    )
    assert other.fingerprint() != tok.fingerprint()


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.update(format=2),
        lambda saved: saved.pop("pattern"),
        lambda saved: saved["ranks"].pop(7),
        lambda saved: saved["ranks"].__setitem__(280, "a"),
        lambda saved: saved["ranks"].__setitem__(280, "東"),
        lambda saved: saved.update(pattern="("),
        lambda saved: saved["specials"].update({"<|bos|>": 5}),
        lambda saved: saved.update(ranks=None),
    ],
)
def test_damaged_files_are_named(tok: RustBPETokenizer, tmp_path: Path, damage: object) -> None:
    path = tok.save(tmp_path)
    saved = read_json(path)
    damage(saved)  # type: ignore[operator]
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        RustBPETokenizer.from_directory(tmp_path)


def test_a_missing_tokenizer_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tok_train"):
        RustBPETokenizer.from_directory(tmp_path)


def test_conversations(tok: RustBPETokenizer) -> None:
    talk: chat.Conversation = {
        "messages": [{"role": "user", "content": "<|bos|>"}, {"role": "assistant", "content": "hi"}]
    }
    ids, mask = tok.render_conversation(talk, max_tokens=100)
    assert tok.decode(ids) == "<|bos|><|user_start|><|bos|><|user_end|><|assistant_start|>hi<|assistant_end|>"
    assert ids.count(291) == 1 and (ids, mask) == chat.render(talk, tok)
    assert len(tok.render_conversation(talk, max_tokens=3)[0]) == 3
    assert tok.decode(tok.render_for_completion(talk)).endswith("<|user_end|><|assistant_start|>")
    colours = tok.visualize_tokenization(ids, mask, with_ids=True)
    assert "\x1b[31m<|bos|> (291)\x1b[0m" in colours and "\x1b[32m<|assistant_end|> (295)\x1b[0m" in colours
    assert tok.visualize_tokenization([10]) == "\x1b[32m\\n\x1b[0m"


def test_the_pypi_package_is_enough(tok: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """rustbpe 0.1 trains and has no from_ranks; then tiktoken encodes, to the same ids."""

    class Old:
        def __init__(self) -> None:
            self.inner = rustbpe.Tokenizer()

        def train_from_iterator(self, iterator: object, vocab_size: int, pattern: str) -> None:
            self.inner.train_from_iterator(iterator, vocab_size, 8192, pattern)

        def get_mergeable_ranks(self) -> list[tuple[list[int], int]]:
            return [(list(token), rank) for token, rank in self.inner.get_mergeable_ranks()]

    monkeypatch.setattr(tokenizer, "_rustbpe", lambda: types.SimpleNamespace(Tokenizer=Old))
    old = RustBPETokenizer.train_from_iterator(iter(CORPUS), 300)
    assert type(old._core).__name__ == "_TiktokenCore" and old.fingerprint() == tok.fingerprint()
    assert old.encode(CORPUS[0]) == tok.encode(CORPUS[0]) and old(CORPUS, prepend=291) == tok(
        CORPUS, prepend=291
    )
    for array in (pa.array(["x é", None, ""]), pa.chunked_array([["x é", None], [""]], pa.large_string())):
        for ours, theirs in zip(tok.encode_arrow(array, "<|bos|>"), old.encode_arrow(array, "<|bos|>", 2)):
            assert ours.tolist() == theirs.tolist() and ours.dtype == theirs.dtype
    assert old.encode_arrow(pa.array([], pa.string()))[0].dtype == np.uint16
    with pytest.raises(TypeError, match="string or large_string"):
        old.encode_arrow(pa.array([1]))
    assert [a.tolist() for a in old.encode_arrays(["x", ""], 291)] == [
        a.tolist() for a in tok.encode_arrays(["x", ""], 291)
    ]


def test_a_folder_is_not_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rustbpe", types.ModuleType("rustbpe"))
    with pytest.raises(UserError, match="not installed"):
        RustBPETokenizer.train_from_iterator(iter(CORPUS), 300)


def test_vocabularies_of_tiktoken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="choose one of"):
        RustBPETokenizer.from_pretrained("gpt9")
    with pytest.raises(UserError, match="not cached and cannot be fetched: NetworkBlocked"):
        RustBPETokenizer.from_pretrained("p50k_base")
    done = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: done.wait(20))
    with pytest.raises(UserError, match="TimeoutError"):
        RustBPETokenizer.from_pretrained("gpt2", timeout_seconds=0.05)
    done.set()
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 300}  # with a gap, as p50k_base has one
    fake = tiktoken.Encoding(
        "gpt2", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    tok = RustBPETokenizer.from_pretrained("gpt2")
    assert (
        tok.encode("ab ab") == [300, 32, 300]
        and tok.get_bos_token_id() == 256
        and tok.get_vocab_size() == 301
    )
    tok.save(tmp_path)
    assert RustBPETokenizer.from_directory(tmp_path).fingerprint() == tok.fingerprint()


def test_training_script(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset=smoke", "--max-chars=20000", "--vocab-size=300"]
    tok_train.main(argv)
    first = RustBPETokenizer.from_directory(Home.find().tokenizer_dir)
    result = read_json(Home.find().result_file("main", "tok_train"))
    assert (
        first.get_vocab_size() == 300 == result["vocab_size"] and first.fingerprint() == result["tokenizer"]
    )
    shown = capsys.readouterr().out
    assert "counting: 0.0 of at most 0.02 M characters" in shown and "merging: 35 of 35 merges" in shown
    assert result["chars"] == 20000 and result["bytes"] >= 20000 and result["bytes_per_token"] > 1
    capsys.readouterr()
    tok_train.main(argv)
    assert "already finished" in capsys.readouterr().out
    tok_train.main([*argv, "--vocab-size=310"])
    assert f"kept as tokenizer-{first.fingerprint()[:12]}.json" in capsys.readouterr().out
    assert RustBPETokenizer.from_directory(Home.find().tokenizer_dir).get_vocab_size() == 310
    (Home.find().tokenizer_dir / "tokenizer.json").write_text("{")
    tok_train.main(argv)  # a damaged file is replaced
    assert RustBPETokenizer.from_directory(Home.find().tokenizer_dir).fingerprint() == first.fingerprint()
    for wrong in ("--vocab-size=264", "--max-chars=0", "--doc-cap=0"):
        with pytest.raises(UserError, match="must be positive"):
            tok_train.main([*argv, wrong])


@pytest.mark.parametrize("max_chars", [1, 700, 1234, 40_000])
def test_what_is_trained_on_ends_at_the_limits(max_chars: int) -> None:
    feed = tok_train.Feed(
        open_source("synthetic", home=Home.find(), seed=3),
        tok_train.Settings(max_chars=max_chars, doc_cap=100),
    )
    fed = [text for array in feed for text in array.to_pylist()]
    wanted: list[str] = []
    for text, _ in open_source("synthetic", home=Home.find(), seed=3).documents("train"):
        left = max_chars - len("".join(wanted))
        if not left:
            break
        wanted.append(text[: min(100, left)])
    assert fed == wanted
    assert (feed.documents, feed.chars) == (len(wanted), max_chars)
    assert feed.bytes == len("".join(wanted).encode())


def test_tokens_are_no_text_to_train_on(tmp_path: Path) -> None:
    tok_train.main(["--preset=smoke", "--max-chars=20000", "--vocab-size=300"])
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph {i}." for i in range(400)))
    tok_shards.main([f"--data=text:{tmp_path / 'book.txt'}", f"--out={tmp_path / 'tokens'}"])
    with pytest.raises(UserError, match="holds tokens, not text"):
        tok_train.main([f"--data=tokens:{tmp_path / 'tokens'}", "--tag=other"])


def test_a_short_text_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paragraphs = [f"Paragraph {i} says {i * 37 % 101} things." for i in range(400)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    tok_train.main([f"--data=text:{tmp_path / 'book.txt'}", "--vocab-size=5000"])
    result = read_json(Home.find().result_file("main", "tok_train"))
    assert 300 < result["documents"] <= 400 and result["vocab_size"] < 5000
    assert "the text has no more pairs" in capsys.readouterr().out


@pytest.mark.slow
def test_measuring_script(
    tok: RustBPETokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tok_eval, "OTHERS", ("gpt2",))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    tok.save(Home.find().tokenizer_dir)
    tok_eval.main(["--preset=smoke", "--max-chars=3000"])
    shown = capsys.readouterr().out
    result = read_json(Home.find().result_file("main", "tok_eval"))
    ratios = result["bytes_per_token"]
    assert set(ratios["ours"]) == {*tok_eval.SAMPLES, "validation"} and ratios["gpt2"] == {}
    for name, text in tok_eval.SAMPLES.items():
        assert ratios["ours"][name] == len(text.encode()) / len(tok.encode(text))
    speeds = result["mb_per_second"]
    assert set(speeds["ours rustbpe"]) == set(ratios["ours"]) == set(speeds["ours tiktoken"])
    assert min(speeds["ours rustbpe"].values()) > 0 and speeds["gpt2 tiktoken"] == {}
    assert "gpt2: not available" in shown and "Korean" in shown and "MB/s, one thread" in shown
    assert (
        "bytes per token" in (Home.find().stage_dir("main", "tok_eval") / "bytes_per_token.svg").read_text()
    )
    tok_eval.main(["--preset=smoke", "--max-chars=3000"])
    assert capsys.readouterr().out.splitlines()[0] in shown
