"""The C files of this package compiled for this processor at first use, with whatever C compiler there is;
or the reason why not.

    if native.ready(x):
        native.call("norm_forward", x, y, inverse, rows, n, eps, native.is_half(x))

The library lies beside the byte code of this package (else in a temporary directory) under a name made of the
source, the flags, the compiler and the processor, so that it is built once. Everything that calls it holds
the same function in PyTorch for machines without a compiler. `_override = False` turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.hardware import cpu_features, cpu_name

C_FOLDER = Path(__file__).with_name("c")
SOURCES = tuple(C_FOLDER / name for name in ("elementwise.c", "attention.c", "muon.c", "matmul.c"))
# which any of the C files may include
HEADERS = tuple(C_FOLDER / name for name in ("common.h", "gemm.h"))
COMPILERS = ("cc", "gcc", "clang")
# Sums may be reordered and products fused; infinities and NaN keep their meaning (so no -ffast-math).
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
FLAGS = ("-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", *MATH)
TUNING = (  # the first that the compiler takes
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    (),
)
# p tensor, l 64-bit integer, i 32-bit integer, f fp32
SIGNATURES = {
    "norm_forward": "pppllfi",
    "norm_backward": "pppplli",
    "rotate_norm_forward": "pppppllllffi",
    "rotate_norm_backward": "ppppppllllfi",
    "relu_squared_forward": "pplli",
    "relu_squared_backward": "ppplli",
    "mix_forward": "pppfflli",
    "mix_backward": "ppppppfflli",
    "softmax_forward": "plllllllplfi",
    "softmax_backward": "pplllllllplfi",
    "cross_entropy": "pppllfii",
    "muon_momentum": "ppppllf",
    "muon_rows": "ppplli",
    "muon_squares": "ppllii",
    "muon_update": "pppllffii",
    "attention_forward": "pppppppllllllf",
    "attention_backward": "pppppppppppllllllf",
    "embedding_forward": "pppll",
    "embedding_backward": "ppplll",
    "matmul": "pppplll" + "iii",
    "polar": "ppllll" + "i",
}
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}

MAX_ROW = 1 << 15  # values of a row that the C code holds on a thread's stack, three such rows at once

_override: bool | None = None  # False: PyTorch alone; None: the library where it can be built


def ready(*tensors: Tensor) -> bool:
    """Whether the library is here and these tensors suit it: contiguous, on the CPU, one dtype (fp32 or
    bf16)."""
    if _override is False or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.bfloat16) or tensors[0].numel() == 0:
        return False
    if tensors[0].shape[-1] > MAX_ROW:
        return False
    for x in tensors:  # called a hundred times a step: no generators
        if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
            return False
    return library() is not None


def is_half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def check_range(name: str, least: int, largest: int, first: int, stop: int) -> None:
    """Raise IndexError unless first <= least and largest < stop.

    C and Triton do not check: there a wrong index reads or writes memory of somebody else.
    """
    if least < first or largest >= stop:
        found = least if least < first else largest
        raise IndexError(f"{name} must lie between {first} and {stop - 1}, found {found}")


def check_indices(name: str, ids: Tensor, first: int, stop: int) -> None:
    """Raise IndexError unless first <= ids < stop. One pass; on a GPU it would have to synchronise."""
    if ids.numel():
        least, largest = ids.aminmax()
        check_range(name, int(least), int(largest), first, stop)


def call(name: str, *arguments: Any) -> None:
    """Run a function of the C files; tensors are passed by address, None as NULL."""
    getattr(library(), name)(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


@cache
def has(part: str) -> bool:
    """Whether `part` ("attention", "matmul") was built with its products: bf16 pairs in AVX512, and no AMX,
    which is faster."""
    lib = library()
    return lib is not None and bool(getattr(lib, f"{part}_is_here")())


def library() -> ctypes.CDLL | None:
    """The loaded library, or None; the reason is said once, on stderr."""
    return _build()[0]


def explain() -> str:
    """One line for a log: what runs the elementwise chains on this CPU, and why."""
    return "CPU kernels: " + _build()[1]


@cache
def _build() -> tuple[ctypes.CDLL | None, str]:
    return build(SOURCES, SIGNATURES)


def build(
    sources: Sequence[Path], signatures: dict[str, str], headers: Sequence[Path] = ()
) -> tuple[ctypes.CDLL | None, str]:
    """The library of any such files: (None, why) where it cannot be had; the caller keeps the answer.

    headers: what they include beside HEADERS, so that a change there builds anew.
    """
    compiler = os.environ.get("CC") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        return _without("there is no C compiler (cc, gcc or clang)")
    machine = f"{compiler} {cpu_name()} {cpu_features()} {torch.__version__} {sys.platform}"
    texts = [path.read_bytes() for path in (*HEADERS, *headers, *sources)]
    recipe = f"{machine} {FLAGS} {TUNING}".encode() + b"".join(texts)
    name, home = f"{sources[0].stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.so", sources[0].parent
    problem = ""
    for folder in (home / "__pycache__", Path(tempfile.gettempdir()) / f"nanochat-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise OSError(f"{folder} belongs to somebody else")
            if not (folder / name).exists():
                _compile(compiler, sources, folder / name)
            lib = ctypes.CDLL(str(folder / name))
            for function, letters in signatures.items():
                getattr(lib, function).argtypes = [TYPES[letter] for letter in letters]
                getattr(lib, function).restype = None
            return lib, f"{', '.join(source.name for source in sources)}, built with {compiler}"
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            problem = str(error).strip().splitlines()[-1]
    return _without(f"{compiler} failed: {problem}")


def _without(reason: str) -> tuple[None, str]:
    said = f"PyTorch's own, because {reason}"
    print(f"CPU kernels: {said}; it is slower without them", file=sys.stderr)
    return None, said


def _compile(compiler: str, sources: Sequence[Path], path: Path) -> None:
    """Build at a temporary name, then rename: several processes may do it at once. OSError if nothing
    works."""
    temporary, said = path.with_name(f"{path.stem}-{os.getpid()}.tmp"), ""
    try:
        for tuning in TUNING:
            command = [*compiler.split(), *FLAGS, *tuning, "-o", str(temporary), *map(str, sources), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                os.replace(temporary, path)
                return
            said = done.stderr
    finally:
        temporary.unlink(missing_ok=True)
    raise OSError(said or "it wrote nothing")
