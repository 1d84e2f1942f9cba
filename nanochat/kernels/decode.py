"""One decoding step of the whole network in C, for single tokens and short chunks on CPUs with a compiler.

In PyTorch a step of one token is a hundred small operations a layer besides four matrices. Here it is one
pass over each matrix: no copies, no masks, no gathered keys. What cannot be run here (no compiler, a GPU,
many tokens without AVX512) goes through GPT.forward_hidden, which is the oracle. build._override = False
turns it off. Letters: N tokens, D width, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat import hardware
from nanochat.kernels import build as native
from nanochat.kernels.elementwise import NORM_EPS

if TYPE_CHECKING:
    from nanochat.gpt import GPT

SOURCE, HEADER = (native.C_FOLDER / name for name in ("decode.c", "dot_gemm.h"))
SIGNATURES = {"multiply": "pplpi", "decode_step": "pppp", "fast_kinds": "p"}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Tokens in one call at most. Beyond, PyTorch's products win where decode.c has no tiles; int8 would have to
# be widened for them. With AMX, which tiles do without, they win later; that number is not measured.
MOST, MOST_INT8, MOST_SMALL, MOST_AMX, ANY = 4, 8, 16, 32, 1 << 40
SMALL_BYTES = 8 << 20  # of all matrices: in the caches, and small calls are what takes time
ONE_THREAD_BYTES = 1 << 20  # a second thread gains less than meeting it costs
MANY = 16  # tokens; for so many it gains again

HUGE_BYTES = 4 << 20  # from this size on a matrix has pages of its own

# positions (T,) -> cos and sin (T, 1, E/2)
RopeTables = Callable[[Tensor], tuple[Tensor, Tensor]]

_P, _L, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CMatrix(ctypes.Structure):
    _fields_ = [("data", _P), ("scale", _P), ("kind", _L), ("rows", _L), ("cols", _L)]


class CLayer(ctypes.Structure):
    _fields_ = [
        *((name, CMatrix) for name in ("qkv", "attn_proj", "mlp_fc", "mlp_proj")),
        *((name, _P) for name in ("ve_gate", "value_embed", "kv")),
        *((name, _L) for name in ("num_blocks", "table", "window")),
        *((name, _F) for name in ("resid_lambda", "x0_lambda")),
    ]


class CNetwork(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("layers", "embedding", "smear_gate", "cos", "sin")),
        *((name, _L) for name in ("vocab_size", "num_positions")),
        *((name, _L) for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim")),
        *((name, _L) for name in ("mlp_width", "smear_channels", "ve_gate_channels", "is_embedding_bf16")),
        *((name, _L) for name in ("block_size", "num_threads", "middle_layer", "kv_kind")),
        *((name, _F) for name in ("smear_lambda", "backout_lambda", "qk_scale", "eps")),
    ]


class CStepInput(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("ids", "previous_ids", "positions", "rows", "pair_embeddings", "tables")),
        *((name, _L) for name in ("count", "num_rows", "num_blocks")),
    ]


class CBadIndex(ctypes.Structure):
    _fields_ = [(name, _L) for name in ("what", "found", "stop")]


# What decode.c refuses, in the order of its enum; 0 is none.
BAD_INDICES = {
    1: "ids must lie between 0 and {last}, found {found}",
    2: "previous ids must lie between -1 and {last}, found {found}",
    3: "rows must lie between 0 and {last}, found {found}",
    4: "positions must lie between 0 and {last}, found {found}",
    5: "positions of a sequence must follow one another, found {found} instead of {last}",
    6: "the block of a position must lie between 0 and {last}, found {found} (-1: it has none)",
}


@cache
def _build() -> ctypes.CDLL | None:
    return native.build((SOURCE,), SIGNATURES, (HEADER,))[0]


def library() -> ctypes.CDLL | None:
    """decode.c loaded, or None where it cannot be built or native._override says no."""
    return None if native._override is False else _build()


def in_huge_pages(matrix: Tensor) -> Tensor:
    """A contiguous copy to be read from end to end, in pages of 2 MB where Linux grants them: 20
    against 16 GB/s of bf16 weights on one core of an AMD EPYC beside other work.
    """
    if matrix.nbytes < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return matrix.clone(memory_format=torch.contiguous_format)
    memory = mmap.mmap(-1, matrix.nbytes)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=matrix.dtype).view(matrix.shape).copy_(matrix)


def describe_matrix(weight_OI: Tensor, scale_O: Tensor | None) -> CMatrix | None:
    """A matrix as decode.c reads it, or None for one that it cannot; its memory must outlive this."""
    on_cpu = weight_OI.device.type == "cpu"
    if not on_cpu or weight_OI.dtype not in KINDS or not weight_OI.is_contiguous() or library() is None:
        return None
    scale_address = None if scale_O is None else scale_O.data_ptr()
    return CMatrix(weight_OI.data_ptr(), scale_address, KINDS[weight_OI.dtype], *weight_OI.shape)


@cache
def tiled_kinds() -> int:
    """The KINDS, as bits, of which any number of rows is fast here."""
    found, lib = ctypes.c_int64(0), _build()
    if lib is not None:
        lib.fast_kinds(ctypes.addressof(found))
    return found.value


def layer_matrices(model: GPT) -> list[list[Any]]:
    """By layer its four inference linears: queries, keys and values in one; projection; MLP in; MLP out."""
    return [
        [getattr(block.attn, "c_qkv", None), block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
        for block in model.blocks
    ]


def supports(model: Any) -> bool:
    """Whether decode.c can run this model: an InferenceGPT on a CPU with a compiler, tables of one dtype."""
    if library() is None or not hasattr(model, "blocks") or model.get_device().type != "cpu":
        return False
    if not model.config.has_kernels:
        return False
    tables = [model.wte.weight, *(table.weight for table in model.value_embeds.values())]
    has_one_dtype = {table.dtype for table in tables} in ({torch.float32}, {torch.bfloat16})
    if not has_one_dtype or any(not table.is_contiguous() for table in tables):
        return False
    return all(getattr(matrix, "native", None) for layer in layer_matrices(model) for matrix in layer)


def kv_dtype(model: Any) -> torch.dtype:
    """What keys and values are kept in on a CPU: bf16 beside narrow matrices if decode.c takes every step.

    Else fp32: SDPA over 1,024 keys of 10 heads took 2.8 ms in bf16 and 0.38 in fp32 (one core of an AMD EPYC
    with AVX512-BF16, torch 2.15).
    """
    if not supports(model) or layer_matrices(model)[0][0].weight_OI.dtype == torch.float32:
        return torch.float32
    return torch.bfloat16 if most_tokens(0, torch.bfloat16) == ANY else torch.float32


def most_tokens(num_bytes: int, dtype: torch.dtype) -> int:
    """Up to how many tokens at once this way is the faster one, for matrices of so many bytes."""
    if tiled_kinds() >> KINDS[dtype] & 1:
        return MOST_AMX if dtype != torch.float32 and "amx" in hardware.cpu_features() else ANY
    return MOST_SMALL if num_bytes <= SMALL_BYTES else MOST_INT8 if dtype == torch.int8 else MOST


def multiply(matrix: CMatrix, x_ND: Tensor) -> Tensor:
    """x W^T of rows x (fp32) -> (N, rows), fp32, as a step multiplies. Needs `library()`."""
    lib = library()
    assert lib is not None and x_ND.dtype == torch.float32 and x_ND.shape[1] == matrix.cols
    x_ND = x_ND.contiguous()
    y_NR = torch.empty(len(x_ND), matrix.rows)
    is_tiny = matrix.rows * matrix.cols < ONE_THREAD_BYTES and len(x_ND) < MANY
    threads = 1 if is_tiny else torch.get_num_threads()
    lib.multiply(ctypes.addressof(matrix), x_ND.data_ptr(), len(x_ND), y_NR.data_ptr(), threads)
    return y_NR


class NativeStep:
    """Steps of up to `most` tokens of one InferenceGPT over one paged cache; `of` says whether it can be had.

    Args:
        stores: by layer, the memory of its keys and values, (slots, 2K, E).
        windows: by layer, keys to the left of a query; -1 for all.
        groups: by layer, which of the num_groups block tables it uses.
        rope_tables: positions (T,) -> cos and sin (T, 1, E/2), fp32.
    """

    def __init__(
        self,
        model: GPT,
        stores: Sequence[Tensor],
        windows: Sequence[int],
        groups: Sequence[int],
        num_groups: int,
        block_size: int,
        rope_tables: RopeTables,
    ) -> None:
        assert block_size % 4 == 0  # decode.c reads keys by fours
        native.check_range("groups of layers", min(groups), max(groups), 0, num_groups)
        cfg = self.config = model.config
        self.model = model
        self.num_groups = num_groups
        self.block_size = block_size
        self.rope_tables = rope_tables
        layers = layer_matrices(model)
        matrices = [matrix.weight_OI for layer in layers for matrix in layer]
        num_bytes = sum(matrix.nbytes for matrix in matrices)
        self.most = most_tokens(num_bytes, matrices[0].dtype)
        self._is_tiny = num_bytes < ONE_THREAD_BYTES
        # C reads the memory of the model, the stores and these small copies.
        self._kept: list[Any] = [list(stores)]
        self._layers = (CLayer * cfg.n_layer)()
        for i, (block, linears) in enumerate(zip(model.blocks, layers, strict=True)):
            table: Any = model.value_embeds[str(i)] if cfg.has_value_embedding(i) else None
            self._layers[i] = CLayer(
                *(linear.native for linear in linears),
                self._address(None if block.attn.ve_gate is None else block.attn.ve_gate.weight.float()),
                self._address(None if table is None else table.weight),
                self._address(stores[i]),
                len(stores[i]) // block_size,
                groups[i],
                windows[i],
                model.resid_lambdas[i].item(),
                model.x0_lambdas[i].item(),
            )
        wte = model.wte.weight
        self._net = CNetwork(
            layers=ctypes.addressof(self._layers),
            embedding=self._address(wte),
            smear_gate=self._address(model.smear_gate.weight.float()),
            vocab_size=len(wte),
            num_layers=cfg.n_layer,
            width=cfg.n_embd,
            num_heads=cfg.n_head,
            num_kv_heads=cfg.n_kv_head,
            head_dim=cfg.head_dim,
            mlp_width=len(layers[0][2].weight_OI),
            smear_channels=cfg.smear_channels,
            ve_gate_channels=cfg.ve_gate_channels,
            is_embedding_bf16=int(wte.dtype == torch.bfloat16),
            block_size=block_size,
            middle_layer=cfg.n_layer // 2,
            kv_kind=KINDS[stores[0].dtype],
            smear_lambda=model.smear_lambda.item(),
            backout_lambda=model.backout_lambda.item(),
            qk_scale=cfg.qk_scale,
            eps=NORM_EPS,
        )
        self._make_rope_tables(cfg.sequence_len)

    @staticmethod
    def of(model: Any, stores: Sequence[Tensor], *place: Any) -> NativeStep | None:
        """For a model that is supported, and stores of fp32, or of bf16 where decode.c multiplies it."""
        dtypes = {store.dtype for store in stores}
        has_bf16_pairs = tiled_kinds() >> KINDS[torch.bfloat16] & 1
        is_known = dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and has_bf16_pairs)
        if not supports(model) or not is_known or any(not store.is_contiguous() for store in stores):
            return None
        return NativeStep(model, stores, *place)

    def _address(self, tensor: Tensor | None) -> int | None:
        """Where a tensor's numbers lie; it is kept alive."""
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _make_rope_tables(self, num_positions: int) -> None:
        cos, sin = self.rope_tables(torch.arange(num_positions))
        self._cos_sin = cos.contiguous(), sin.contiguous()
        self._net.cos, self._net.sin = (table.data_ptr() for table in self._cos_sin)
        self._net.num_positions = num_positions

    def __call__(
        self, ids: Sequence[int], prev: Sequence[int], positions: Sequence[int], rows: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
    ) -> Tensor:  # fmt: skip
        """Hidden states (N, D); writes keys and values. rows: the sequence of each token, whose tokens come
        one after the other; tables[group][row]: its blocks. Raises IndexError for an index outside its table.
        """
        lib, cfg, N = library(), self.config, len(ids)
        assert lib is not None and self.most >= N
        is_equal = len(prev) == len(positions) == len(rows) == N and len(tables) == self.num_groups
        if not is_equal or len({len(group) for group in tables}) != 1:
            raise ValueError("ids, prev, positions, rows and the tables of each group must be equally many")
        num_blocks = max(len(table) for group in tables for table in group)
        num_blocks = min(num_blocks, max(positions) // self.block_size + 1)
        if num_blocks * self.block_size > self._net.num_positions:
            self._make_rope_tables(2 * num_blocks * self.block_size)
        flat = [
            block
            for group in tables
            for table in group
            for block in (*table[:num_blocks], *[-1] * (num_blocks - len(table)))
        ]
        numbers = (ctypes.c_int64 * (4 * N))(*ids, *prev, *positions, *rows)
        blocks = (ctypes.c_int32 * len(flat))(*flat)
        hidden_ND = torch.empty(N, cfg.n_embd)
        self._net.num_threads = 1 if self._is_tiny and N < MANY else torch.get_num_threads()
        at, bad = ctypes.addressof(numbers), CBadIndex()
        pairs_ND = None
        if self.model.bigram_embeds is not None:
            pairs_ND = self.model.bigram_embeds(torch.tensor(ids), torch.tensor(prev)).float().contiguous()
        step = CStepInput(
            at, at + 8 * N, at + 16 * N, at + 24 * N, None if pairs_ND is None else pairs_ND.data_ptr(),
            ctypes.addressof(blocks), N, len(tables[0]), num_blocks,
        )  # fmt: skip
        lib.decode_step(
            ctypes.addressof(self._net), ctypes.addressof(step), hidden_ND.data_ptr(), ctypes.addressof(bad)
        )
        if bad.what:
            raise IndexError(BAD_INDICES[bad.what].format(last=bad.stop - 1, found=bad.found))
        return hidden_ND
