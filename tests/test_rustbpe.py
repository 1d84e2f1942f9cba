"""rustbpe from Python: equal to plain Python and to tiktoken, and a superset of the PyPI package."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat import bpe
from nanochat.tokenizer import SPLIT_PATTERN

ours = pytest.mark.skipif(
    not hasattr(rustbpe.Tokenizer, "from_ranks"), reason="the PyPI package rustbpe is installed, not ours"
)
GPT4_PATTERN = SPLIT_PATTERN.replace("{1,2}", "{1,3}")

# few letters, so that pairs repeat; and anything assigned (\x1c..\x1f are space to `regex` and not to Rust)
small = st.text(alphabet="ab c'1.\n", max_size=40)
anything = st.text(
    st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\x1c\x1d\x1e\x1f"), max_size=30
)
texts = st.lists(small | anything, max_size=6)


def train(corpus: list[str], vocab_size: int, pattern: str = SPLIT_PATTERN, **how: int) -> rustbpe.Tokenizer:
    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(iter(corpus), vocab_size, pattern=pattern, **how)
    return tok


def tiktoken_of(tok: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = {bytes(token): rank for token, rank in tok.get_mergeable_ranks()}
    return tiktoken.Encoding("t", pat_str=tok.get_pattern(), mergeable_ranks=ranks, special_tokens={})


@settings(max_examples=60)
@given(corpus=texts, text=small | anything, vocab_size=st.integers(256, 300))
@example(corpus=["aaaaaaa aaa aa"], text="aaaaaaaaaaa", vocab_size=262)
@example(corpus=["ababab", "abab b"], text="bababab", vocab_size=262)
def test_equals_plain_python(corpus: list[str], text: str, vocab_size: int) -> None:
    tok = train(corpus, vocab_size)
    tokens = bpe.train(corpus, vocab_size, SPLIT_PATTERN)
    assert [(bytes(token), rank) for token, rank in tok.get_mergeable_ranks()] == list(
        zip(tokens, range(1000))
    )
    assert tok.encode(text) == bpe.encode(text, tokens, SPLIT_PATTERN)


@settings(max_examples=60)
@given(corpus=texts, text=small | anything)
def test_equals_tiktoken(corpus: list[str], text: str) -> None:
    tok = train([*corpus, text], 400)
    assert tok.encode(text) == tiktoken_of(tok).encode_ordinary(text)
    assert tok.decode(tok.encode(text)) == text


@ours
@given(
    st.lists(st.text("abc", min_size=2, max_size=5), unique=True, max_size=12), st.text("abc ", max_size=150)
)
def test_any_ranks_equal_tiktoken(words: list[str], text: str) -> None:
    """Ranks that no training gives: tokens whose halves are no tokens, in any order."""
    tokens = [bytes([255 - byte]) for byte in range(256)] + [word.encode() for word in words]
    tok = rustbpe.Tokenizer.from_ranks([(token, i) for i, token in enumerate(tokens)], GPT4_PATTERN)
    assert (
        tok.encode(text) == tiktoken_of(tok).encode_ordinary(text) == bpe.encode(text, tokens, GPT4_PATTERN)
    )


def test_tiktoken_on_long_pieces() -> None:
    corpus = ["x = [1, 2, 3]\n" * 5, "naïve café 東京タワー 🎈🎈🎈 " * 5]
    tok = train(corpus, 400)
    other = tiktoken_of(tok)
    for text in ["ab" * 200, "x =" * 300, "東京" * 100, "🎈" * 150, " \n \t" * 99, "".join(corpus)]:
        assert tok.encode(text) == other.encode_ordinary(text)


def test_surface_of_the_pypi_package() -> None:
    tok = rustbpe.Tokenizer()
    assert (tok.vocab_size, tok.get_pattern(), len(tok.get_mergeable_ranks())) == (256, "", 256)
    tok.train_from_iterator(iter(["hello hello world"] * 3), 300, buffer_size=2)
    merges = [b"el", b"hel", b"lo", b"hello", b" w", b" hello", b"ld", b"or", b" wor", b" world"]
    assert [token for token, _ in tok.get_mergeable_ranks()[256:]] == merges  # as rustbpe 0.1.0 gives them
    assert (tok.vocab_size, tok.get_pattern()) == (266, GPT4_PATTERN)
    assert tok.encode("hello") == [259] and tok.decode([259, 265]) == "hello world"
    assert tok.batch_encode(["hello", "", " world"]) == [[259], [], [265]]
    assert isinstance(tok.get_mergeable_ranks()[0][0], bytes)
    with pytest.raises(ValueError, match="Unknown token id: 300"):
        tok.decode([300])
    with pytest.raises(ValueError, match="regex"):
        tok.train_from_iterator(iter(["a"]), 300, pattern="(")
    with pytest.raises(TypeError):
        tok.train_from_iterator(iter([1]), 300)
    with pytest.raises(UnicodeEncodeError):
        tok.encode("\ud800")


@ours
def test_what_we_add() -> None:
    tok = train(["hello hello"], 300)
    same = rustbpe.Tokenizer.from_ranks(tok.get_mergeable_ranks(), tok.get_pattern())
    assert same.get_mergeable_ranks() == tok.get_mergeable_ranks() and repr(same) == repr(tok)
    assert tok.decode_bytes([255, 104]) == b"\xffh" and tok.decode([255, 104]) == "\ufffdh"
    flat, lengths = tok.batch_encode_buffer(["hello", "", "ab"], num_threads=2)
    assert memoryview(flat).cast("i").tolist() == tok.encode("hello") + [97, 98] and lengths == [1, 0, 2]
    with pytest.raises(ValueError, match="from 256"):
        tok.train_from_iterator(iter(["a"]), 255)
    with pytest.raises(ValueError, match="single byte"):
        rustbpe.Tokenizer.from_ranks([(b"a", 0)], "")
    assert rustbpe.Tokenizer().encode("é") == [195, 169]  # untrained: bytes


@ours
def test_threads_and_buffers_change_nothing() -> None:
    corpus = [f"line {i * i % 97} of the {'very ' * (i % 5)}long text\n" for i in range(500)]
    merges = train(corpus, 400, buffer_size=8192).get_mergeable_ranks()
    assert train(corpus, 400, buffer_size=1).get_mergeable_ranks() == merges
    assert train(corpus[::-1], 400, buffer_size=7).get_mergeable_ranks() == merges
    tok = train(corpus, 400)
    one_by_one = [tok.encode(text) for text in corpus]
    assert all(tok.batch_encode(corpus, num_threads=n) == one_by_one for n in (1, 2, 5))


@ours
@pytest.mark.parametrize("letter", ["a", " ", "🎈", "ab"])
def test_a_megabyte_of_one_letter(letter: str) -> None:
    tok = train(["aa aaaa  é🎈🎈 ab abab 11 1111\n\n\n"] * 3, 280)
    text = letter * (1_000_000 // len(letter.encode()))
    start = time.process_time()
    assert tok.decode(tok.encode(text)) == text
    retrained = train([text, text + "x"], 270)
    assert time.process_time() - start < 10  # 0.3 s here; quadratic would be hours
    assert retrained.decode(retrained.encode(text)) == text


def test_failed_training_changes_nothing() -> None:
    tok = train(["hello hello"], 300)
    before = tok.get_mergeable_ranks()

    def broken() -> object:
        yield "some text"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        tok.train_from_iterator(broken(), 300)
    assert tok.get_mergeable_ranks() == before


COUNTING = "itertools.repeat('some words to count again and again ' * 100)"
MERGING = "iter([''.join(random.Random(1).choices('abcdefghijklmnopqrstuvwxyz', k=3_000_000))])"


@ours
@pytest.mark.parametrize("work", [COUNTING, MERGING])
def test_control_c_is_heard(work: str) -> None:
    code = f"""
import itertools, random, threading, os, signal, time, rustbpe
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
texts = {work}
def press():
    time.sleep(0.7)
    os.kill(os.getpid(), signal.SIGINT)
tok = rustbpe.Tokenizer()
threading.Thread(target=press).start()
try:
    tok.train_from_iterator(texts, 1 << 20, pattern="")
except KeyboardInterrupt:
    print("heard", tok.vocab_size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "heard 256\n" and done.returncode == 0, (
        done.stderr
    )  # 256: it did not run to its end


def arrays_of(texts: list[str | None]) -> list[object]:
    """The same texts in every shape that Arrow has for them."""
    half = len(texts) // 2
    return [
        pa.array(texts, pa.string()),
        pa.array(texts, pa.large_string()),
        pa.array(["cut", *texts, "off"], pa.string()).slice(1, len(texts)),
        pa.chunked_array([texts[:half], [], texts[half:]], pa.large_string()),
        pa.table({"text": texts}, pa.schema([("text", pa.string())]))["text"],
    ]


@ours
@settings(max_examples=30)
@given(texts=st.lists(st.none() | small | anything, max_size=9), num_threads=st.integers(1, 3))
@example(texts=[], num_threads=1)
@example(texts=[None, "", "ab c"], num_threads=2)
def test_arrow_equals_one_by_one(texts: list[str | None], num_threads: int) -> None:
    tok = train(["ab c'1", "ab ab"], 270)
    one_by_one = [[] if text is None else [65535, *tok.encode(text)] for text in texts]
    for array in arrays_of(texts):
        tokens, offsets = tok.encode_arrow(array, prepend=65535, num_threads=num_threads)
        assert tokens.dtype == np.uint16 and offsets.dtype == np.int64 and len(offsets) == len(texts) + 1
        assert [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)] == one_by_one


@ours
def test_arrow_dtypes_and_memory() -> None:
    tok = train(["ab ab"], 270)
    assert tok.encode_arrow(pa.array(["ab"]), prepend=65536)[0].dtype == np.int32
    wide = rustbpe.Tokenizer.from_ranks([*tok.get_mergeable_ranks(), (b"zz", 65536)], tok.get_pattern())
    assert wide.encode_arrow(pa.array(["zz"]))[0].dtype == np.int32
    tokens, offsets = tok.encode_arrow(pa.array(["ab ab"] * 3))
    del tok
    tokens[0] = 7  # their own memory, which stays after the tokenizer
    assert tokens.tolist() == [7, 257, 256, 257, 256, 257] and offsets.tolist() == [0, 2, 4, 6]


@ours
def test_what_is_no_arrow_array_of_strings() -> None:
    tok = rustbpe.Tokenizer()
    for wrong in (["a"], "a", None, 1):
        with pytest.raises(TypeError, match="expected an Arrow array of strings, found"):
            tok.encode_arrow(wrong)
    words = pa.array(["a", "b"])
    for array in (pa.array([1]), words.dictionary_encode(), pa.table({"text": words}), words.cast("binary")):
        with pytest.raises(TypeError, match="must be of type string or large_string"):
            tok.encode_arrow(array)
    bad = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"ok", b"\xff"]).buffers()[1:]])
    with pytest.raises(ValueError, match="text 1 is not UTF-8 from byte 0 on"):
        tok.encode_arrow(bad)
    with pytest.raises(ValueError, match="text 1 is not UTF-8"):
        tok.train_from_iterator(iter([bad]), 300)
    falling = pa.array([0, 2, 1], pa.int32()).buffers()[1]
    with pytest.raises(ValueError, match="bad offsets at row 1"):
        tok.encode_arrow(pa.Array.from_buffers(pa.string(), 2, [None, falling, pa.py_buffer(b"abc")]))
    with pytest.raises(ValueError, match="below 2"):
        tok.encode_arrow(words, prepend=1 << 31)


@ours
def test_training_on_arrow_arrays() -> None:
    corpus = [f"line {i * i % 97} of the {'very ' * (i % 5)}long text" for i in range(300)]
    merges = train(corpus, 400).get_mergeable_ranks()
    for array in arrays_of([*corpus, None]):
        assert train([array], 400).get_mergeable_ranks() == merges
    mixed = [*corpus[:100], pa.array(corpus[100:200]), *corpus[200:]]
    assert train(mixed, 400).get_mergeable_ranks() == merges


# the patterns of GPT-4 and GPT-4o as tiktoken has them; rustbpe has a scanner for each
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
OTHER = r"\p{L}+|\d|[^\p{L}\d]+?"  # goes through a regex engine
PATTERNS = [SPLIT_PATTERN, GPT4_PATTERN, CL100K, O200K, OTHER]
looked_at = st.text("abAB'sStTlLſ09 \t\r\n/\u3000\x85.,!éßÅǅʰ中\u0301٣½😀", max_size=60)


@ours
@settings(max_examples=40)
@given(corpus=st.lists(looked_at, max_size=4), text=looked_at | anything)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_equal_tiktoken(pattern: str, corpus: list[str], text: str) -> None:
    tok = train([*corpus, text], 300, pattern)
    assert tok.encode(text) == tiktoken_of(tok).encode_ordinary(text)
    assert tok.get_pattern() == pattern


def test_the_patterns_are_tiktokens() -> None:
    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public)
    assert CL100K in source and all(part in source for part in O200K.split("|") if len(part) > 8)


@pytest.mark.skipif(
    not os.path.isdir(os.environ.get("NANOCHAT_TEXTS", "")), reason="NANOCHAT_TEXTS names no folder"
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_of_a_folder_equal_tiktoken(pattern: str) -> None:
    """Every .txt below $NANOCHAT_TEXTS, of any language."""
    files = sorted(Path(os.environ["NANOCHAT_TEXTS"]).rglob("*.txt"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    tok = train(texts, 8000, pattern)
    other = tiktoken_of(tok)
    tokens, offsets = tok.encode_arrow(pa.array(texts))
    for file, text, (a, b) in zip(files, texts, itertools.pairwise(offsets)):
        assert tokens[a:b].tolist() == other.encode_ordinary(text), file
        assert tok.decode(tokens[a:b].tolist()) == text


@ours
@given(st.lists(st.integers(0, 269), max_size=30))
@example([240, 159, 152, 128, 226, 130, 104, 195])
def test_the_decoder_equals_decoding_at_once(ids: list[int]) -> None:
    tok = train(["ab ab é é 😀😀 中中"], 270)
    decoder = tok.decoder()
    ids = [index for index in ids if index < tok.vocab_size]
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tok.decode(ids)
    assert tok.decode(ids) == tok.decode_bytes(ids).decode("utf-8", "replace")


@ours
def test_the_decoder_holds_back_what_is_not_whole() -> None:
    decoder = rustbpe.Tokenizer().decoder()
    assert [decoder.push(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert decoder.push(0xE2) == "" and decoder.push_bytes(b"<|bos|>") == "\ufffd<|bos|>"
    assert decoder.push(0xF0) == "" and decoder.finish() == "\ufffd" and decoder.finish() == ""
    with pytest.raises(ValueError, match="Unknown token id: 256"):
        decoder.push(256)


@ours
def test_progress_of_merging() -> None:
    calls: list[tuple[int, int]] = []
    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(
        iter(["ab ab abc"]), 300, progress=lambda *call: calls.append(call), num_threads=1
    )
    assert calls[-1] == (tok.vocab_size - 256, 44) and tok.vocab_size < 300

    def stop(merges: int, of: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tok.train_from_iterator(iter(["hello world"]), 400, progress=stop)


@ours
@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "🎈" * 250_000, "東京" * 160_000])
def test_a_megabyte_encodes_in_a_second(text: str) -> None:
    tok = train(["aa aaaa aaaaaaaa", "       ", "🎈🎈🎈🎈", "東京東京東京"], 300)
    start = time.process_time()
    ids = tok.encode(text)
    assert time.process_time() - start < 1  # 0.1 s here
    assert tok.decode(ids) == text


@ours
def test_control_c_is_heard_while_encoding() -> None:
    code = """
import os, signal, threading, time, pyarrow, rustbpe
signal.signal(signal.SIGINT, signal.default_int_handler)
array = pyarrow.array(["some words to encode again and again " * 1000] * 3000)  # many seconds of work
def press():
    time.sleep(0.5)
    pressed.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
pressed = []
threading.Thread(target=press).start()
try:
    rustbpe.Tokenizer.from_ranks([(bytes([i]), i) for i in range(256)], r"\\p{L}+|.").encode_arrow(array)
except KeyboardInterrupt:
    print("heard", time.monotonic() - pressed[0] < 5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "heard True\n" and done.returncode == 0, done.stderr
