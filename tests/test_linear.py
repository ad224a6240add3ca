"""Matrix-free solves against dense ones, on random symmetric matrices."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from bilevel import InputError, linear
from bilevel.linear import CG, MINRES, Fisher, Identity, LinearStatus, Neumann, Nystrom


@st.composite
def systems(draw, low=1.0):
    """(H, b): H symmetric with eigenvalues in [low, 30], d = 1..8."""
    d = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.tensor(draw(st.lists(st.floats(low, 30.0), min_size=d, max_size=d))).double()
    return q @ torch.diag(spectrum) @ q.T, torch.randn(d, generator=generator, dtype=torch.float64)


def split(v):
    """A flat vector as two leaves, so that nothing may assume one tensor."""
    return [v[:1], v[1:]]


def product(matrix):
    return lambda v: split(matrix @ torch.cat(v))


def solved(solver, matrix, b, start=None):
    result = solver.solve(product(matrix), split(b), start)
    return torch.cat(result.solution), result


@given(systems(), st.floats(0.0, 2.0))
def test_cg_equals_the_dense_solve(system, damping):
    """I7: after d steps the relative error is at most 1e-10 kappa; the residual is the true one."""
    matrix, b = system
    full = matrix + damping * torch.eye(len(b)).double()
    v, result = solved(CG(steps=3 * len(b), tolerance=1e-13, damping=damping), matrix, b)
    exact = torch.linalg.solve(full, b)
    assert (v - exact).norm() <= 1e-10 * torch.linalg.cond(full) * exact.norm()
    assert abs(result.residual - float((b - full @ v).norm())) <= 1e-12 * (1 + float(b.norm()))
    assert result.products <= 3 * len(b)


@given(systems(), st.integers(1, 6))
def test_cg_contracts_at_its_rate(system, steps):
    """I7: |v_k - v|_H <= 2 ((sqrt kappa - 1) / (sqrt kappa + 1))^k |v|_H."""
    matrix, b = system
    v, _ = solved(CG(steps=steps, tolerance=0.0), matrix, b)
    exact = torch.linalg.solve(matrix, b)
    size = lambda e: float((e @ matrix @ e).clamp(min=0).sqrt())  # noqa: E731
    root = math.sqrt(float(torch.linalg.cond(matrix)))
    rate = 2 * ((root - 1) / (root + 1)) ** steps
    assert size(v - exact) <= rate * size(exact) * (1 + 1e-9) + 1e-10


@given(systems(), st.integers(1, 20), st.booleans())
def test_neumann_is_the_series(system, steps, warm):
    """I8: v_K = H^-1 (I - (I - lr H)^K) b from zero; the error contracts by I - lr H from v_0."""
    matrix, b = system
    lr = 1 / float(torch.linalg.eigvalsh(matrix)[-1])
    start = torch.ones_like(b) if warm else None
    v, result = solved(
        Neumann(steps=steps, lr=lr), matrix, b, None if start is None else split(start)
    )
    step = torch.eye(len(b)).double() - lr * matrix
    exact = torch.linalg.solve(matrix, b)
    first = torch.zeros_like(b) if start is None else start
    expected = exact + torch.linalg.matrix_power(step, steps) @ (first - exact)
    assert torch.allclose(v, expected, atol=1e-12, rtol=1e-12)
    assert result.products == steps - (start is None)


@given(systems(), st.integers(1, 12), st.floats(0.0, 0.9))
def test_neumann_with_momentum_is_the_adjoint_of_the_map(system, steps, momentum):
    """I10: the gradient of b'y_T through T steps of momentum descent from the minimum, J = I."""
    matrix, b = system
    lr = 1 / float(torch.linalg.eigvalsh(matrix)[-1])
    v, result = solved(Neumann(steps=steps, lr=lr, momentum=momentum), matrix, b)
    x = torch.zeros_like(b, requires_grad=True)
    y = before = torch.zeros_like(b)  # minimizes y'Hy/2 - x'y at x = 0
    for _ in range(steps):
        y, before = y - lr * (matrix @ y - x) + momentum * (y - before), y
    (expected,) = torch.autograd.grad(b @ y, x)
    assert torch.allclose(v, expected, atol=1e-12, rtol=1e-12)
    assert result.products == steps - 1


def test_momentum_is_faster_and_starts_where_told():
    matrix = torch.diag(torch.tensor([1.0, 100.0])).double()
    b = torch.ones(2).double()
    exact = torch.linalg.solve(matrix, b)
    errors = [
        (solved(Neumann(steps=60, lr=0.01, momentum=m), matrix, b)[0] - exact).norm()
        for m in (0.0, 0.8)
    ]
    assert errors[1] < 0.1 * errors[0]
    again, _ = solved(Neumann(steps=5, lr=0.01, momentum=0.8), matrix, b, split(exact))
    assert torch.allclose(again, exact, atol=1e-15)


@given(systems(), st.integers(0, 12), st.floats(0.01, 10.0))
def test_fisher_is_the_dense_inverse(system, count, damping):
    """I29: Woodbury against the dense matrix, to 1e-12 times its condition."""
    _, b = system
    generator = torch.Generator().manual_seed(count)
    g = torch.randn(count, len(b), generator=generator, dtype=torch.float64)
    v, result = solved(Fisher(rows=[split(row) for row in g], damping=damping), None, b)
    dense = damping * torch.eye(len(b)).double() + g.T @ g / max(count, 1)
    exact = torch.linalg.solve(dense, b)
    assert (v - exact).norm() <= 1e-12 * torch.linalg.cond(dense) * exact.norm()
    assert result.products == 0


@given(systems(low=-30.0))
def test_minres_solves_indefinite_systems(system):
    matrix, b = system
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.where(values.abs() < 0.1, values.sign() + 0.1, values)  # far from singular
    matrix = vectors @ torch.diag(values) @ vectors.T
    v, result = solved(MINRES(steps=200, tolerance=1e-13), matrix, b)
    exact = torch.linalg.solve(matrix, b)
    assert (v - exact).norm() <= 1e-8 * torch.linalg.cond(matrix) * exact.norm()
    assert result.residual <= 1e-8 * torch.linalg.cond(matrix) * b.norm()


@given(systems(), st.floats(0.01, 1.0), st.integers(0, 5))
def test_nystrom_of_full_rank_is_the_damped_inverse(system, damping, seed):
    """I29: exact at rank d; below it within E / (damping (damping + E))."""
    matrix, b = system
    eye = torch.eye(len(b)).double()
    v, result = solved(Nystrom(rank=len(b), damping=damping, seed=seed), matrix, b)
    exact = torch.linalg.solve(matrix + damping * eye, b)
    assert (v - exact).norm() <= 1e-7 * exact.norm() / damping
    assert result.products == len(b)
    v, _ = solved(Nystrom(rank=1, damping=damping, seed=seed), matrix, b)
    chosen = torch.randperm(len(b), generator=torch.Generator().manual_seed(seed))[0]
    column = matrix[:, [chosen]]
    low_rank = column @ column.T / matrix[chosen, chosen]
    gap = float(torch.linalg.matrix_norm(matrix - low_rank, 2))
    dense = torch.linalg.solve(low_rank + damping * eye, b)
    assert (v - dense).norm() <= 1e-8 * dense.norm() / damping
    assert (v - exact).norm() <= gap / (damping * (damping + gap)) * b.norm() * (1 + 1e-8) + 1e-10


@pytest.mark.parametrize(
    "solver",
    [
        CG(steps=3),
        MINRES(steps=5),
        Neumann(lr=0.25, steps=12),
        Identity(),
        Nystrom(rank=2, damping=0.5),
        Nystrom(rank=3, damping=0.5),
        Fisher(rows=[split(torch.tensor([2.0, 1.0, 0.0]).bfloat16())], damping=0.5),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_vectors_of_half_precision_are_taken(solver):
    matrix, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double(), torch.tensor([3.0, 2.0, 1.0])
    exact, _ = solved(solver, matrix, b.double())
    v, _ = solved(solver, matrix.bfloat16(), b.bfloat16())
    assert v.dtype == torch.bfloat16
    torch.testing.assert_close(v.double(), exact, rtol=0.05, atol=0.05)  # roundings of 2^-8


def test_nystrom_of_a_singular_matrix_leaves_its_null_space():
    matrix, b = torch.ones(4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    v, _ = solved(Nystrom(rank=4, damping=0.1), matrix, b)
    exact = torch.linalg.solve(matrix.double() + 0.1 * torch.eye(4), b.double())
    torch.testing.assert_close(v.double(), exact, rtol=1e-4, atol=1e-4)


def test_cg_stops_at_negative_curvature():
    matrix = torch.diag(torch.tensor([1.0, -1.0])).double()
    _, result = solved(CG(), matrix, torch.tensor([1.0, 2.0]).double())
    assert result.status is LinearStatus.CURVATURE


def test_cg_of_one_product_starts_at_zero():
    """From anywhere else the product would go into judging the start, and v would stay there."""
    matrix, b = torch.diag(torch.tensor([1.0, 10.0])).double(), torch.ones(2).double()
    v, result = solved(CG(steps=1), matrix, b, split(-b))
    torch.testing.assert_close(v, b * (b @ b) / (b @ matrix @ b))
    assert result.products == 1


def test_cg_starts_at_zero_where_its_start_is_worse():
    matrix = torch.diag(torch.tensor([1.0, 10.0, 100.0])).double()
    b, far = torch.ones(3).double(), split(1e20 * torch.ones(3).double())
    v, result = solved(CG(steps=4, tolerance=1e-10), matrix, b, far)
    assert result.status is LinearStatus.CONVERGED and result.products == 4  # one for the start
    torch.testing.assert_close(v, torch.linalg.solve(matrix, b))
    near = split(torch.tensor([0.9, 0.1, 0.01], dtype=torch.float64))
    assert solved(CG(steps=2), matrix, b, near)[1].residual < 1e-9  # kept: one step is left


def test_cg_says_that_a_singular_system_is_singular():
    matrix = torch.diag(torch.tensor([1.0, 0.0])).double()
    _, result = solved(CG(), matrix, torch.tensor([1.0, 1.0]).double())
    assert result.status is LinearStatus.CURVATURE


def test_cg_uses_its_preconditioner():
    """With the inverse itself one product is enough."""
    matrix = torch.diag(torch.tensor([1.0, 10.0, 100.0])).double()
    solver = CG(precondition=product(torch.linalg.inv(matrix)), tolerance=1e-12)
    _, result = solved(solver, matrix, torch.ones(3).double())
    assert result.products == 1 and result.status is LinearStatus.CONVERGED


def test_cg_from_the_answer_costs_one_product():
    matrix = torch.diag(torch.tensor([1.0, 10.0])).double()
    b = torch.ones(2).double()
    _, result = solved(CG(), matrix, b, split(torch.linalg.solve(matrix, b)))
    assert result.products == 1 and result.status is LinearStatus.CONVERGED


def test_cg_of_zero_is_zero():
    v, result = solved(CG(), torch.eye(2).double(), torch.zeros(2).double())
    assert not v.any() and result.products == 0


def test_neumann_reports_divergence():
    _, result = solved(
        Neumann(steps=200, lr=1.0), 3 * torch.eye(2).double(), torch.ones(2).double()
    )
    assert result.status is LinearStatus.DIVERGED


def test_identity_is_one_term_of_neumann():
    matrix, b = 3 * torch.eye(2).double(), torch.tensor([1.0, -2.0]).double()
    one, _ = solved(Neumann(steps=1, lr=0.2), matrix, b)
    scaled, result = solved(Identity(scale=0.2), matrix, b)
    assert torch.equal(one, scaled) and result.products == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: CG(steps=0, damping=-0.1),
        lambda: Neumann(lr=0.0),
        lambda: Neumann(momentum=1.0),
        lambda: Fisher(damping=0.0),
        lambda: Nystrom(damping=0.0),
        lambda: MINRES(tolerance=-1.0),
    ],
)
def test_wrong_options_are_refused(make):
    with pytest.raises(InputError, match="must be"):
        make()


def test_norm():
    assert linear.norm([torch.tensor([3.0]), torch.tensor([4.0])]) == 5.0
