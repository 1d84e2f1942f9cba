"""matmul.c against fp64, whatever the shape; layers made one node against the same layers one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_builds import bf16_pairs

from nanochat.kernels import build as native
from nanochat.kernels import layer as layers
from nanochat.kernels import matmul
from nanochat.kernels.linear import Embedding, Linear
from nanochat.kernels.loss import weighted_nll

# (rows, inputs, outputs): whole tiles; rests of every kind; sums longer than a pass; more rows than a block
SHAPES = [(96, 64, 128), (67, 34, 70), (33, 4200, 38), (700, 96, 450)]


@pytest.fixture
def needs_products() -> Iterator[None]:
    with bf16_pairs():
        yield


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To the rounding of the dtype found, beside the largest of the values wanted."""
    step = 2**-8 if found.dtype == torch.bfloat16 else 2**-18
    assert (found.double() - wanted).abs().max() <= step * wanted.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_what_follows_them(shape: tuple[int, int, int], needs_products: None) -> None:
    rows, inputs, outputs = shape
    x, w, dy = bf16(rows, inputs), bf16(outputs, inputs, seed=1), bf16(rows, outputs, seed=2)
    wide_x, wide_w, wide_dy = x.double(), w.double(), dy.double()
    y, plus = wide_x @ wide_w.T, bf16(rows, outputs, seed=3)
    close(matmul.forward(x, w), y)
    close(matmul.forward(x, w, plus), y + plus.double())
    close(matmul.forward(x, w, is_squared=True), y.clamp(min=0).square())
    dx, more, squares = wide_dy @ wide_w, bf16(rows, inputs, seed=4), x.relu().square()
    close(matmul.gradient_of_input(dy, w), dx)
    close(matmul.gradient_of_input(dy, w, squared=squares), dx * 2 * squares.double().sqrt())
    sum_of = more.clone()
    assert matmul.gradient_of_input(dy, w, add_to=sum_of) is sum_of
    close(sum_of, dx + more.double())
    close(matmul.gradient_of_weight(dy, x), wide_dy.T @ wide_x)
    total = torch.ones(outputs, inputs)
    matmul.gradient_of_weight(dy, x, add_to=total)
    close(total, wide_dy.T @ wide_x + 1)


@pytest.mark.parametrize("shape", [(4, 128, 384), (2, 70, 70), (2, 64, 4200), (8, 390, 36)])
def test_polar_is_the_polynomial_of_its_steps(shape: tuple[int, int, int], needs_products: None) -> None:
    """Two steps of mild factors, one at a time and both at once, against fp64."""
    X = bf16(*shape)
    X = X / X.double().norm(dim=(1, 2), keepdim=True).bfloat16()
    steps, wanted = [(1.5, -0.7, 0.2), (1.2, -0.5, 0.3)], X.double()
    for a, b, c in steps:
        A = wanted @ wanted.mT
        wanted = a * wanted + (b * A + c * A @ A) @ wanted
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for is_pairwise in (False, True):
            found = matmul.polar(X, steps, is_pairwise)
            assert found is not None and found.is_contiguous()
            assert (found.double() - wanted).norm() < 0.006 * wanted.norm()
        assert matmul.polar(X[:1], steps, False) is None  # one matrix would leave a thread idle
        assert matmul.polar(X[:, :33], steps, False) is None or shape[2] % 2
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_company_or_on_threads(needs_products: None) -> None:
    x, w, dy = bf16(500, 160), bf16(200, 160, seed=1), bf16(500, 200, seed=2)
    before, made = torch.get_num_threads(), list[tuple[torch.Tensor, ...]]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            X = matmul.polar(bf16(12, 96, 160), [(1.0, -1e-6, 1e-12)], False)
            assert X is not None
            made.append((matmul.forward(x, w), matmul.gradient_of_input(dy, w), X))
            made[-1] += (matmul.gradient_of_weight(dy, x),)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
    assert torch.equal(matmul.forward(x[37:110], w), made[0][0][37:110])


def test_nan_and_infinity_come_through(needs_products: None) -> None:
    x, w = bf16(64, 64), bf16(64, 64, seed=1)
    x[3, 5], x[4] = float("nan"), 0.0
    x[6, 0] = float("inf")
    y, squares = matmul.forward(x, w), matmul.forward(x, w, is_squared=True)
    for z in (y, squares):
        assert z[3].isnan().all() and not z[4].any() and z[7:].isfinite().all()
    assert y[6].isinf().all() and torch.equal(squares[6], y[6].clamp(min=0))
    dw = matmul.gradient_of_weight(x, w)
    assert dw[5].isnan().all() and dw[6].isfinite().all()


def test_what_does_not_suit_is_left_to_pytorch() -> None:
    for x in (torch.zeros(64, 64), bf16(64, 33), bf16(8, 64), bf16(64, 128)[:, ::2], bf16(64, 64).T[:, :32]):
        assert not matmul.is_fast(x)
    layer = Linear(64, 64)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = bf16(8, 64)
    plain = F.linear(x, layer.weight.bfloat16())
    assert torch.equal(layers.linear_plus(x, layer, x), x + plain)
    assert torch.equal(layers.linears(x, layer)[0], plain)


def test_odd_sums_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair would reach across the end of a row: an odd vocabulary, an odd number of outputs."""
    hidden, head = (
        bf16(40, 64).requires_grad_(),
        torch.randn(65, 64, generator=torch.Generator().manual_seed(5)),
    )
    targets = torch.arange(40)
    layer, x = Linear(64, 35), bf16(40, 64, seed=1).requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(head[:35])
    made = []
    for override in (None, False):
        monkeypatch.setattr(native, "_override", override)
        loss = weighted_nll(hidden, head, targets, torch.ones(()).expand(40), 65, 15.0)
        y = layers.linear_plus(x, layer, bf16(40, 35, seed=2))
        made.append([y, *torch.autograd.grad(loss + y.float().square().sum(), (hidden, x, layer.weight))])
    for found, plain in zip(*made, strict=True):
        assert (found.double() - plain.double()).norm() < 0.02 * plain.double().norm()


@pytest.mark.parametrize(("rows", "inputs"), [(40, 66), (42, 64)])
def test_shapes_that_do_not_fit_are_refused(rows: int, inputs: int, needs_products: None) -> None:
    x, w, dy = bf16(40, 64), bf16(32, inputs, seed=1), bf16(rows, 32, seed=2)
    with pytest.raises(ValueError, match="must fit"):
        if inputs != 64:
            matmul.forward(x, w)
        else:
            matmul.gradient_of_weight(dy, x)
    with pytest.raises(ValueError, match="must fit"):
        matmul.forward(x, bf16(32, 64), plus=bf16(rows, 34))


def test_an_odd_sum_is_refused(needs_products: None) -> None:
    with pytest.raises(ValueError, match="must be even, found 65"):
        matmul.gradient_of_input(bf16(40, 65), bf16(65, 64))


def layers_and_input() -> tuple[list[Linear], torch.Tensor]:
    layers, generator = [Linear(96, 96), Linear(96, 48), Linear(96, 384), Linear(384, 96)], torch.Generator()
    for layer in layers:
        with torch.no_grad():
            layer.weight.normal_(std=0.1, generator=generator.manual_seed(layer.weight.numel()))
    return layers, bf16(2, 80, 96).requires_grad_()


@pytest.mark.parametrize("frozen", [(), (2,), (0, 2, 3)])
def test_one_node_is_as_exact_as_its_parts(frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both against fp64: outputs and all gradients; also where some weights are frozen."""

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        (one, two, inner, outer), start = layers_and_input()
        for i in frozen:
            (one, two, inner, outer)[i].weight.requires_grad_(False)
        x = start.detach().to(dtype).requires_grad_()
        if dtype == torch.float64:
            for layer in (one, two, inner, outer):
                layer.weight.data = layer.weight.data.bfloat16().double()
        a, b = layers.linears(x, one, two)
        y = layers.mlp_plus(layers.linear_plus(a, one, x), inner, outer, x)
        loss = (y * torch.linspace(-1, 1, 96, dtype=dtype)).sum() + b.square().sum()
        trained = [layer.weight for layer in (one, two, inner, outer) if layer.weight.requires_grad]
        return [y, *torch.autograd.grad(loss, [x, *trained])]

    exact, fused = run(torch.float64), run(torch.bfloat16)
    monkeypatch.setattr(native, "_override", False)
    for wanted, found, plain in zip(exact, fused, run(torch.bfloat16), strict=True):
        ours, theirs = ((t.double() - wanted).norm() / wanted.norm() for t in (found, plain))
        assert found.dtype == plain.dtype and ours <= 1.1 * theirs < 0.03


@pytest.mark.parametrize("is_native", [True, False])
def test_rows_of_a_table_are_cast_while_they_are_read(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native, "_override", False)
    table = Embedding(300, 40)
    with torch.no_grad():
        table.weight.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 300, (4, 90), generator=torch.Generator().manual_seed(1))[:, ::2]
    rows, plain = table(ids, torch.bfloat16), table(ids).bfloat16()
    assert torch.equal(rows, plain)
    grad = bf16(*rows.shape)
    ours, theirs = (torch.autograd.grad(y, table.weight, grad)[0] for y in (rows, plain))
    assert torch.equal(ours, theirs) and torch.equal(table(ids, torch.float32), table(ids))
    for wrong in (-1, 300):
        with pytest.raises(IndexError):
            table(torch.tensor([0, wrong]), torch.bfloat16)
