"""Compiles the C files of this package for this processor at first use, and calls them.

    if build.ready(x):
        build.call("norm_forward", x, y, inverse, rows, n, eps, build.is_bf16(x))

The library lies beside the byte code of this package (else in a temporary directory), under a name made of
the sources, the flags, the compiler and the processor, so that it is built once. Without a compiler the
reason is printed once, and every caller runs the same function in PyTorch. `_override = False` turns the
library off.
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
# Headers that any of the C files may include: a change of them builds anew.
HEADERS = tuple(C_FOLDER / name for name in ("common.h", "gemm.h"))
COMPILERS = ("cc", "gcc", "clang")
# Sums may be reordered and products fused; infinities and NaN keep their meaning (so no -ffast-math).
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
FLAGS = ("-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", *MATH)
# The first that the compiler accepts: x86, ARM, compilers without OpenMP.
TUNING = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    (),
)
# The arguments of each function: p tensor, l 64-bit integer, i 32-bit integer, f fp32.
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
# Values in the longest row that C holds on a thread's stack (three such rows at once).
MAX_ROW = 1 << 15
COMPILE_SECONDS = 120

# False: PyTorch alone. None: the library where it can be built.
_override: bool | None = None


def ready(*tensors: Tensor) -> bool:
    """Whether C can work on these tensors: on the CPU, contiguous, of one dtype (fp32 or bf16), not empty."""
    if _override is False or torch.compiler.is_compiling():
        return False
    first = tensors[0]
    dtype = first.dtype
    if dtype not in (torch.float32, torch.bfloat16) or first.numel() == 0 or first.shape[-1] > MAX_ROW:
        return False
    # This runs a hundred times a step: a loop is faster than all(...).
    for x in tensors:
        if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
            return False
    return library() is not None


def is_bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def call(name: str, *arguments: Any) -> None:
    """Run a function of the C files; tensors are passed by address, None as NULL.

    C checks no index and no shape: the caller does, see `check_indices`.
    """
    getattr(library(), name)(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def check_indices(name: str, ids: Tensor, first: int, stop: int) -> None:
    """Raise IndexError unless first <= ids < stop. One pass; on a GPU it would have to synchronise."""
    if ids.numel():
        smallest, largest = ids.aminmax()
        check_range(name, int(smallest), int(largest), first, stop)


def check_range(name: str, smallest: int, largest: int, first: int, stop: int) -> None:
    """Raise IndexError unless first <= smallest and largest < stop.

    With a wrong index C and Triton would read or write memory that belongs to something else.
    """
    if smallest < first or largest >= stop:
        found = smallest if smallest < first else largest
        raise IndexError(f"{name} must lie between {first} and {stop - 1}, found {found}")


@cache
def has(part: str) -> bool:
    """Whether `part` ("attention" or "matmul") is compiled for this processor: it needs AVX512-BF16, and is
    left out where there is AMX, whose products in PyTorch are faster."""
    lib = library()
    return lib is not None and bool(getattr(lib, f"{part}_is_here")())


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
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
    """Compile and load C files: (library, how it was built), or (None, why not). The caller keeps the answer.

    headers: what they include besides HEADERS.
    """
    compiler = os.environ.get("CC") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        return _unsupported("there is no C compiler (cc, gcc or clang)")

    # Everything that decides what the compiler writes is in the name.
    machine = f"{compiler} {cpu_name()} {cpu_features()} {torch.__version__} {sys.platform}"
    recipe = hashlib.sha256(f"{machine} {FLAGS} {TUNING}".encode())
    for path in (*HEADERS, *headers, *sources):
        recipe.update(path.read_bytes())
    name = f"{sources[0].stem}-{recipe.hexdigest()[:16]}.so"

    # The package's folder may belong to root, the temporary directory to everybody.
    problem = ""
    user_folder = Path(tempfile.gettempdir()) / f"nanochat-{os.getuid()}"
    for folder in (sources[0].parent / "__pycache__", user_folder):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise OSError(f"{folder} belongs to another user")
            if not (folder / name).exists():
                _compile(compiler, sources, folder / name)
            lib = ctypes.CDLL(str(folder / name))
            for function, letters in signatures.items():
                getattr(lib, function).argtypes = [TYPES[letter] for letter in letters]
                getattr(lib, function).restype = None
            return lib, f"{', '.join(source.name for source in sources)}, built with {compiler}"
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            problem = str(error).strip().splitlines()[-1]
    return _unsupported(f"{compiler} failed: {problem}")


def _unsupported(reason: str) -> tuple[None, str]:
    answer = f"PyTorch's own, because {reason}"
    print(f"CPU kernels: {answer}; it is slower without them", file=sys.stderr)
    return None, answer


def _compile(compiler: str, sources: Sequence[Path], path: Path) -> None:
    """Raises OSError with the compiler's last words if no tuning works."""
    # Built under a temporary name, then renamed: several processes may do it at once.
    temporary = path.with_name(f"{path.stem}-{os.getpid()}.tmp")
    output = ""
    try:
        for tuning in TUNING:
            command = [*compiler.split(), *FLAGS, *tuning, "-o", str(temporary), *map(str, sources), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode == 0:
                os.replace(temporary, path)
                return
            output = done.stderr
    finally:
        temporary.unlink(missing_ok=True)
    raise OSError(output or "it wrote nothing")
