"""RustBPETokenizer: byte-level BPE plus special tokens, saved as JSON.

`rustbpe` trains and encodes. With the package of that name from PyPI, which cannot be built from ranks,
tiktoken encodes; the ids are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from nanochat import chat_format as chat
from nanochat.chat_format import SPECIAL_TOKENS
from nanochat.errors import UserError
from nanochat.home import read_json, write_json

# GPT-4's pattern, except that numbers are cut into two digits instead of three: better at small vocabularies.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
FILE_NAME = "tokenizer.json"
FORMAT = 1
END_OF_TEXT = "<|endoftext|>"  # begins documents in vocabularies that have no <|bos|>

Ranks = list[tuple[bytes, int]]
Special = str | int | None  # a special token by its name or id


class RustBPETokenizer:
    """Text to ids and back. Ordinary text never becomes a special id, whatever it spells."""

    def __init__(self, ranks: Ranks, pattern: str, specials: dict[str, int]) -> None:
        if not {bytes([byte]) for byte in range(256)} <= (tokens := {token for token, _ in ranks}):
            raise ValueError("ranks must hold all 256 single bytes")
        taken = {rank for _, rank in ranks}
        if not len(tokens) == len(taken) == len(ranks):
            raise ValueError("ranks must differ from each other")
        if len(set(specials.values()) - taken) != len(specials):
            raise ValueError(f"special ids must differ from each other and from the ranks, found {specials}")
        self._ranks = sorted(ranks, key=lambda pair: pair[1])
        self._pattern, self._specials = pattern, dict(specials)
        self._special_names = {index: name for name, index in specials.items()}
        self._token_bytes = {rank: token for token, rank in ranks}
        self._vocab_size = max([*taken, *specials.values()]) + 1
        self._core = _core(self._ranks, pattern)

    # Where tokenizers come from, and where they go.

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[Any],
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        progress: Callable[[int, int], None] | None = None,
    ) -> RustBPETokenizer:
        """Train on `texts`; the special tokens count in `vocab_size`. A small text may yield fewer tokens.

        A text may also be an Arrow array of strings, which our rustbpe reads in place. `progress(merges, of)`
        is called now and then, and not at all by the package from PyPI.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size must be at least {smallest}, found {vocab_size}")
        core = _rustbpe().Tokenizer()
        more: dict[str, Any] = {"pattern": pattern}
        if hasattr(core, "encode_arrow"):
            more["progress"] = progress
        else:
            texts = _each(texts)
        core.train_from_iterator(map(_well_formed, texts), vocab_size - len(SPECIAL_TOKENS), **more)
        ranks = [(bytes(token), rank) for token, rank in core.get_mergeable_ranks()]
        return cls(ranks, pattern, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_directory(cls, directory: Path | str) -> RustBPETokenizer:
        """Load what `save` wrote. Raises UserError when it is missing or damaged."""
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise UserError(f"there is no tokenizer at {path}", "run python -m scripts.tok_train")
        saved = read_json(path)
        try:
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']} instead of {FORMAT}")
            ranks = [(text.encode("latin-1"), i) for i, text in enumerate(saved["ranks"]) if text is not None]
            return cls(ranks, saved["pattern"], saved["specials"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}", "run python -m scripts.tok_train again") from error

    @classmethod
    def from_pretrained(cls, name: str, timeout_seconds: float = 60) -> RustBPETokenizer:
        """One of tiktoken's vocabularies ("gpt2", "cl100k_base", ...) with its own special tokens.

        Raises UserError for an unknown name, or when it is not cached and cannot be fetched in time.
        """
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            known = ", ".join(tiktoken.list_encoding_names())
            raise UserError(f"tiktoken has no vocabulary {name!r}", f"choose one of: {known}")
        done: list[Any] = []

        def fetch() -> None:
            try:
                done.append(tiktoken.get_encoding(name))
            except Exception as error:  # whatever the network does; told to the person below
                done.append(error)

        # tiktoken sets no time limit of its own, so it fetches in a thread that may be left behind.
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(timeout_seconds)
        found = done[0] if done else TimeoutError(f"no answer in {timeout_seconds:g} s")
        if isinstance(found, Exception):
            raise UserError(
                f"the vocabulary {name!r} is not cached and cannot be fetched: {type(found).__name__}",
                "connect to the internet, or set TIKTOKEN_CACHE_DIR to a folder that has it",
            ) from found
        return cls(list(found._mergeable_ranks.items()), found._pat_str, found._special_tokens)

    def save(self, directory: Path | str) -> Path:
        """Write tokenizer.json into `directory`, atomically; returns its path."""
        path = Path(directory) / FILE_NAME
        write_json(path, self._as_json())
        return path

    def _as_json(self) -> dict[str, Any]:
        ranks: list[str | None] = [None] * (self._ranks[-1][1] + 1)
        for token, rank in self._ranks:
            ranks[rank] = token.decode("latin-1")  # one character a byte
        return {"format": FORMAT, "pattern": self._pattern, "specials": self._specials, "ranks": ranks}

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides about ids: ranks, pattern, special tokens."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._as_json(), sort_keys=True).encode()).hexdigest()

    # The vocabulary.

    def get_vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return self._vocab_size

    def get_special_tokens(self) -> list[str]:
        """The names of the special tokens in the order of their ids."""
        return sorted(self._specials, key=lambda name: self._specials[name])

    def get_mergeable_ranks(self) -> Ranks:
        """(bytes, id) of every token that is not special, in the order of ids."""
        return list(self._ranks)

    def get_pattern(self) -> str:
        return self._pattern

    def encode_special(self, name: str) -> int:
        """The id of a special token, by its name."""
        if name not in self._specials:
            raise ValueError(f"the special tokens are {self.get_special_tokens()}, found {name!r}")
        return self._specials[name]

    def get_bos_token_id(self) -> int:
        """The id that begins every document."""
        return self.encode_special(chat.BOS if chat.BOS in self._specials else END_OF_TEXT)

    def id_to_token(self, index: int) -> str:
        """A token as text; bytes that are no whole character become U+FFFD."""
        return self.decode_bytes([index]).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: the number of bytes of each token, 0 for special ones."""
        lengths = np.zeros(self._vocab_size, dtype=np.int32)
        for token, rank in self._ranks:
            lengths[rank] = len(token)
        return lengths

    # Text to ids.

    @overload
    def encode(
        self, text: str, prepend: Special = None, append: Special = None, num_threads: int = 8
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: list[str], prepend: Special = None, append: Special = None, num_threads: int = 8
    ) -> list[list[int]]: ...

    def encode(
        self, text: str | list[str], prepend: Special = None, append: Special = None, num_threads: int = 8
    ) -> list[int] | list[list[int]]:
        """The ids of a text, or of each text of a list (in parallel). Lone surrogates count as U+FFFD."""
        before, after = self._special(prepend), self._special(append)
        if isinstance(text, str):
            return before + self._core.encode(_well_formed(text)) + after
        if not isinstance(text, list) or not all(isinstance(one, str) for one in text):
            raise TypeError(f"text must be a str or a list of str, found {type(text).__name__}")
        batch = self._core.batch_encode([_well_formed(one) for one in text], num_threads)
        return [before + ids + after for ids in batch] if before or after else batch

    __call__ = encode

    def encode_arrays(
        self, texts: list[str], prepend: Special = None, num_threads: int = 8
    ) -> list[np.ndarray]:
        """The ids of each text as an int32 array, for the data loader."""
        flat, lengths = self._core.batch_encode_buffer([_well_formed(one) for one in texts], num_threads)
        pieces = np.split(np.frombuffer(flat, dtype=np.int32), np.cumsum(lengths))[: len(texts)]
        before = np.array(self._special(prepend), dtype=np.int32)
        return [np.concatenate([before, piece]) for piece in pieces] if before.size else pieces

    def encode_arrow(
        self, array: Any, prepend: Special = None, num_threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, offsets) of an Arrow array of strings: text i is tokens[offsets[i] : offsets[i + 1]].

        `array` is a pyarrow Array or ChunkedArray, or anything else with `__arrow_c_array__` or
        `__arrow_c_stream__`. tokens are uint16 if the vocabulary has at most 65,536 ids, else int32; offsets
        are int64. `prepend` begins every text; a null is no text and has no tokens. ValueError for bytes that
        are not UTF-8.
        """
        before = self._special(prepend)
        tokens, offsets = self._core.encode_arrow(array, before[0] if before else None, num_threads)
        return tokens.astype(self.token_dtype(), copy=False), offsets

    def token_dtype(self) -> np.dtype:
        """The smallest of uint16 and int32 that holds all ids."""
        return np.dtype(np.uint16 if self._vocab_size <= 1 << 16 else np.int32)

    def _special(self, token: Special) -> list[int]:
        if token is None:
            return []
        return [token if isinstance(token, int) else self.encode_special(token)]

    # Ids to text.

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids; a special token gives the bytes of its name."""
        try:
            return b"".join(self._bytes_of(int(index)) for index in ids)
        except KeyError as error:
            raise ValueError(f"ids must be tokens below {self._vocab_size}, found {error}") from None

    def _bytes_of(self, index: int) -> bytes:
        token = self._token_bytes.get(index)
        return self._special_names[index].encode() if token is None else token

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # Conversations.

    def render_conversation(
        self, conversation: chat.Conversation, max_tokens: int | None = 2048
    ) -> tuple[list[int], list[int]]:
        """(ids, mask): see nanochat.chat_format."""
        return chat.render(conversation, self, max_tokens)

    def render_for_completion(self, conversation: chat.Conversation) -> list[int]:
        """The ids to continue with an answer: see nanochat.chat_format."""
        return chat.render_for_completion(conversation, self)

    def visualize_tokenization(
        self, ids: Sequence[int], mask: Sequence[int] | None = None, with_ids: bool = False
    ) -> str:
        """The tokens in colour for a terminal: green where the mask is 1, red where it is 0."""
        pieces = []
        for index, bit in zip(ids, mask if mask is not None else [1] * len(ids), strict=True):
            text = self.id_to_token(index).replace("\n", "\\n") + (f" ({index})" if with_ids else "")
            pieces.append(f"\x1b[{32 if bit else 31}m{text}\x1b[0m")
        return "|".join(pieces)


@overload
def _well_formed(text: str) -> str: ...


@overload
def _well_formed(text: Any) -> Any: ...


def _well_formed(text: Any) -> Any:
    """`text` without lone surrogates, which UTF-8 cannot hold: pairs are joined, others become U+FFFD.

    What is no str (an Arrow array) stays as it is.
    """
    if not isinstance(text, str) or text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _each(texts: Iterable[Any]) -> Iterator[str]:
    """The texts one by one, those of Arrow arrays too; nulls are left out."""
    for text in texts:
        if isinstance(text, str):
            yield text
        else:
            yield from (one for one in _strings(text).to_pylist() if one is not None)


def _strings(array: Any) -> Any:
    """Anything that speaks Arrow's PyCapsule interface, as pyarrow's Array or ChunkedArray of strings."""
    import pyarrow as pa

    strings = pa.array(array) if hasattr(array, "__arrow_c_array__") else pa.chunked_array(array)
    if not (pa.types.is_string(strings.type) or pa.types.is_large_string(strings.type)):
        raise TypeError(f"the Arrow array must be of type string or large_string, found {strings.type}")
    return strings


def _rustbpe() -> Any:
    import rustbpe

    if not hasattr(rustbpe, "Tokenizer"):  # the source folder of the crate, seen from the repository root
        raise UserError("rustbpe is not installed", "run pip install ./rustbpe, or pip install rustbpe")
    return rustbpe


def _core(ranks: Ranks, pattern: str) -> Any:
    """What encodes: our rustbpe if it is installed, else tiktoken."""
    rust = _rustbpe().Tokenizer
    return rust.from_ranks(ranks, pattern) if hasattr(rust, "encode_arrow") else _TiktokenCore(ranks, pattern)


class _TiktokenCore:
    """tiktoken under the names of our rustbpe."""

    def __init__(self, ranks: Ranks, pattern: str) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def batch_encode(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)

    def batch_encode_buffer(self, texts: list[str], num_threads: int) -> tuple[bytearray, list[int]]:
        batch = self.batch_encode(texts, num_threads)
        flat = np.fromiter((i for ids in batch for i in ids), dtype=np.int32)
        return bytearray(flat.tobytes()), [len(ids) for ids in batch]

    def encode_arrow(
        self, array: Any, prepend: int | None, num_threads: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        texts = _strings(array).to_pylist()
        batch = self.batch_encode([text or "" for text in texts], num_threads or os.cpu_count() or 1)
        before = [] if prepend is None else [prepend]
        batch = [[] if text is None else before + ids for text, ids in zip(texts, batch)]
        offsets = np.zeros(len(batch) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in batch], out=offsets[1:])
        return np.fromiter((i for ids in batch for i in ids), dtype=np.int32, count=offsets[-1]), offsets
