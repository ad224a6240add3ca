"""resolve, hypergradient and compare against closed forms, dense algebra and each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bilevel
from bilevel import Functions, InputError, compare, hypergradient, resolve
from bilevel.problems.quadratic import Quadratic
from bilevel.problems.softmax_mixture import SoftmaxMixture

quadratics = st.builds(
    Quadratic,
    dim_x=st.integers(1, 8),
    dim_y=st.integers(1, 8),
    condition=st.floats(1.0, 30.0),
    data_seed=st.integers(0, 10_000),
)
ZERO = torch.zeros((), dtype=torch.float64)


def functions(upper, lower, y0, **options):
    return Functions(upper, lower, ZERO, y0, **options)


@given(quadratics)
def test_resolve_finds_the_lower_solution(problem):
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    found, star = resolve(problem, x), problem.solution().lower(x)
    assert found.converged
    assert (found.y - star).norm() <= 1e-7 * (1 + star.norm())  # mu is 1: |y - y*| <= |grad|
    assert found.upper == pytest.approx(float(problem.upper(x, found.y, None)))


@given(quadratics)
def test_exact_and_difference_equal_the_closed_form(problem):
    x = torch.ones(problem.dim_x, dtype=torch.float64)
    true = problem.solution().hypergradient(x)
    exact = hypergradient(problem, x)
    assert (exact.value[0] - true).norm() <= 1e-6 * (1 + true.norm())
    assert exact.evidence["smallest"] == pytest.approx(1.0)
    assert exact.evidence["largest"] == pytest.approx(problem.condition if problem.dim_y > 1 else 1)
    assert not exact.warnings
    found = hypergradient(problem, x, method="difference")
    assert (found.value[0] - true).norm() <= 1e-4 * (1 + true.norm())


def test_many_lower_variables_are_solved_without_a_matrix(monkeypatch):
    import sys

    from bilevel import hypergradient as _  # noqa: F401  the function; the module is in sys.modules

    monkeypatch.setattr(sys.modules["bilevel.hypergradient"], "DENSE", 1)
    problem = Quadratic()
    x = torch.ones(3, dtype=torch.float64)
    true = problem.solution().hypergradient(x)
    found = hypergradient(problem, x)
    assert "smallest" not in found.evidence
    assert (found.value[0] - true).norm() <= 1e-6 * (1 + true.norm())


@pytest.mark.parametrize("target", [-1.0, 0.25, 2.0])
def test_a_constrained_lower_level_is_solved_and_differenced(target):
    """g = (y - x)^2 on [-0.5, 0.5] at x = target: y* = clip(x), dy*/dx = 1 inside and 0 outside."""
    problem = functions(
        lambda x, y: (y - 3) ** 2,
        lambda x, y: (y - x) ** 2,
        ZERO,
        project_lower=lambda y: y.clamp(-0.5, 0.5),
    )
    x = ZERO + target
    found = resolve(problem, x)
    star = min(max(target, -0.5), 0.5)
    assert found.converged and float(found.y) == pytest.approx(star, abs=1e-8)
    slope = 2 * (star - 3) if abs(target) < 0.5 else 0.0
    assert float(hypergradient(problem, x).value[0]) == pytest.approx(slope, abs=1e-6)


@given(st.integers(2, 6), st.integers(0, 1000))
def test_resolve_on_a_simplex_equals_the_projection(size, seed):
    """argmin |y - t|^2 / 2 over the simplex, by an ill-conditioned quadratic too."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(size, generator=generator, dtype=torch.float64)
    weights = 1 + 9 * torch.rand(size, generator=generator, dtype=torch.float64)

    def project(y):
        s = y.sort(descending=True).values
        k = torch.arange(1, len(y) + 1)
        tau = ((s.cumsum(0) - 1) / k)[(s - (s.cumsum(0) - 1) / k > 0).sum() - 1]
        return (y - tau).clamp(min=0)

    problem = functions(
        lambda x, y: y.sum() * (1 + x),
        lambda x, y: (weights * (y - t) ** 2).sum() / 2,
        torch.ones(size, dtype=torch.float64) / size,
        project_lower=project,
    )
    y = resolve(problem, ZERO).y
    slope = weights * (y - t)
    active = y > 1e-7
    assert float(y.sum()) == pytest.approx(1.0)
    assert float(slope[active].max() - slope[active].min()) <= 1e-6  # KKT: equal on the support
    assert bool((slope >= slope[active].min() - 1e-6).all())


def test_a_module_is_solved_on_a_copy():
    torch.manual_seed(0)
    module = nn.Linear(3, 1).double()
    before = module.weight.detach().clone()
    rows = torch.randn(20, 3, dtype=torch.float64)
    problem = Functions(
        lambda x, y: (y(rows) - 1).square().mean(),
        lambda x, y: (y(rows) - 2).square().mean() + x.exp() * y.weight.square().sum(),
        ZERO,
        module,
    )
    found = hypergradient(problem, ZERO)
    other = hypergradient(problem, ZERO, method="difference")
    assert torch.allclose(found.value[0], other.value[0], atol=1e-6)
    assert torch.equal(module.weight.detach(), before)
    assert isinstance(resolve(problem, ZERO).y, nn.Linear)


def test_the_estimate_of_a_solver_is_the_one_it_would_step_along():
    problem = Quadratic()
    x = torch.ones(3, dtype=torch.float64)
    true = problem.solution().hypergradient(x)
    found = hypergradient(problem, x, method="aid", steps=100)
    assert (found.value[0] - true).norm() <= 1e-4 * true.norm()
    assert found.counts["cross"] == 100 and torch.equal(x, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("lower", "words"),
    [
        (lambda x, y: (y[0] - x) ** 2, "several minimizers"),
        (lambda x, y: ((y**2 - 1) ** 2).sum() + 0.1 * x.exp() * y.sum(), "from another start"),
        (lambda x, y: (y - x).square().sum() + (30 * y).cos().sum(), "minimizer"),
    ],
)
def test_what_makes_the_number_meaningless_is_said(lower, words):
    problem = functions(lambda x, y: (y - 1).square().sum(), lower, torch.zeros(2).double() + 0.1)
    assert any(words in warning for warning in hypergradient(problem).warnings)


def test_a_saddle_is_not_taken_for_a_minimum():
    """Started at a maximum with zero gradient, the lower solve goes nowhere."""
    problem = functions(lambda x, y: (y - 1) ** 2, lambda x, y: (y**2 - 1) ** 2 + 0 * x * y, ZERO)
    assert any("not convex" in warning for warning in hypergradient(problem).warnings)


def test_methods_side_by_side():
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)
    found = compare(SoftmaxMixture(), ["f2ba", "aid"], x=x, steps=100)
    first, second = found.rows
    assert (first.method, second.method) == ("aid", "f2ba")
    assert first.error < 1e-5 and first.cosine == pytest.approx(1.0)
    # the penalty of f2ba is 100, and the forward estimate dF / (1 + 1/100) on this family
    assert second.error == pytest.approx(1 - 1 / 1.01, rel=1e-3)
    assert second.counts["lower_grad"] == 100 * 20
    assert "f2ba" in repr(found) and "9.90e-03" in repr(found)


def test_a_method_that_cannot_be_used_is_a_row_that_says_so(tmp_path):
    problem = functions(
        lambda x, y: (y - 3) ** 2,
        lambda x, y: (y - x) ** 2,
        ZERO,
        project_lower=lambda y: y.clamp(-9, 9),
    )
    found = compare(problem, ["aid", "f2ba"], steps=5)
    assert [row.method for row in found.rows] == ["f2ba", "aid"]
    assert "project_lower" in found.rows[1].note
    assert found.plot(tmp_path / "c.png").stat().st_size > 1000


def test_too_many_upper_variables_for_differences():
    problem = Functions(
        lambda x, y: y.sum(), lambda x, y: (y - x).square().sum(), torch.zeros(51), torch.zeros(51)
    )
    with pytest.raises(InputError, match="51 entries"):
        hypergradient(problem, method="difference")


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-4, 1.0, 1e6])
def test_the_scale_of_the_lower_loss_does_not_matter(scale):
    """I17: g -> c g leaves y* and dF as they are."""
    problem, x = Quadratic(), torch.ones(3, dtype=torch.float64)
    scaled = Functions(
        lambda a, b: problem.upper(a, b, None),
        lambda a, b: scale * problem.lower(a, b, None),
        x,
        torch.zeros(5, dtype=torch.float64),
    )
    found, true = hypergradient(scaled, x), problem.solution().hypergradient(x)
    assert (found.value[0] - true).norm() <= 1e-5 * true.norm()
    assert not found.warnings
    star = problem.solution().lower(x)
    assert resolve(scaled, x).converged and resolve(scaled, x, star).converged
    assert (resolve(scaled, x).y - star).norm() <= 1e-6 * star.norm()


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_minimize_says_when_its_own_y_flatters_it(scale):
    """Descent with a step of 0.1 on a curvature of 2 scale never gets near y*(x)."""
    result = bilevel.minimize(
        lambda x, y: (y - 1).square().sum(),
        lambda x, y: scale * (y - x).square().sum(),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        solver="f2sa",
        steps=400,
    )
    honest = float(((result.x - 1) ** 2).sum())  # y*(x) = x
    assert result.evidence["honest_upper"] == pytest.approx(honest, rel=1e-6)
    assert any("solver's own y" in words for words in result.warnings)


def test_minimize_is_quiet_where_its_answer_is_right():
    result = bilevel.minimize(
        lambda x, y: (y - 1).square().sum() + 0.1,
        lambda x, y: (y - x).square().sum(),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        solver="auto",
        steps=500,
    )
    assert result.warnings == [] and result.evidence["honest_upper"] == pytest.approx(0.1, rel=1e-3)


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="finite start"):
        resolve(functions(lambda x, y: y, lambda x, y: 1 / y, ZERO), ZERO)


def test_a_result_shows_its_evidence():
    result = bilevel.solve(Quadratic(), "aid", steps=3)
    assert "lower_gradient" in repr(result) and result.evidence["linear_residual"] < 1e-5


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (torch.zeros(3), r"value \(\), got value \(3,\)"),
        ({"a": torch.zeros(())}, r"value \(\), got \['a'\] \(\)"),
        (0.5, r"value \(\), got value float"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        resolve,
        hypergradient,
        lambda problem, x: hypergradient(problem, x, method="aid"),
        lambda problem, x: compare(problem, ["aid"], x=x),
    ],
)
def test_an_upper_variable_of_another_shape_is_refused(call, x, came):
    zero = torch.zeros((), dtype=torch.float64)
    problem = Functions(lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2, zero, zero)
    with pytest.raises(InputError, match=f"x must be shaped as the problem's start, {came}"):
        call(problem, x)


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_a_lower_level_without_a_minimum_is_said(method):
    """Descent on it ends where squares of its numbers overflow."""
    zero = torch.zeros((), dtype=torch.float64)
    problem = Functions(lambda x, y: (y - 1) ** 2, lambda x, y: -((y - x) ** 2), zero, zero)
    found = hypergradient(problem, zero, method=method)
    assert any("not convex" in words or "is not solved" in words for words in found.warnings)
