"""Compiled loops give the numbers of autograd, or say why they cannot.

Fast tests run the loops as they are, in Python; slow ones compile them.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_trace import CLOSE, DOUBLE, ROWS, noisy, normal

import bilevel
from bilevel import compiled, loops
from bilevel.compiled import Compiled
from bilevel.errors import InputError
from bilevel.linear import CG, LinearStatus
from bilevel.problems.hypercleaning import Hypercleaning
from bilevel.problems.quadratic import Quadratic
from bilevel.solve import start
from bilevel.solvers.implicit import AID
from bilevel.solvers.unrolled import ITD

inductor = pytest.mark.skipif(torch.__version__ < compiled.SINCE, reason="needs a newer torch")
"""Marks a test that compiles."""


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda function, given: function)


def network():
    """Two layers, tall and wide, a softmax and a strength of each kind."""
    labels = torch.arange(40) % 3

    def lower(x, y):
        scores = torch.tanh(ROWS @ y["a"] + y["c"]) @ y["b"]
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        return (x["w"].sigmoid() * losses).mean() + x["r"].exp() * y["a"].pow(2).sum() / 20

    def upper(x, y):
        return torch.tanh(ROWS[:9] @ y["a"]).square().mean() + y["b"].sum() * x["r"] / 9

    y0 = {"a": normal(6, 4, seed=1), "b": normal(4, 3, seed=2), "c": torch.zeros(4, **DOUBLE)}
    x0 = {"w": torch.zeros(40, **DOUBLE), "r": torch.zeros((), **DOUBLE)}
    return bilevel.Functions(upper, lower, x0, y0)


SOLVERS = {
    "aid": AID(linear_steps=3, lower_lr=0.05, upper_optimizer="sgd"),
    "converged": AID(lower_lr=0.05, inner_steps=3),
    "damped": AID(linear_steps=3, lower_lr=0.05, damping=0.1, warm=False, inner_steps=0),
    "itd": ITD(lower_lr=0.05, upper_optimizer="sgd"),
    "heavy": ITD(lower_lr=0.05, momentum=0.5, upper_optimizer="sgd"),
    "truncated": ITD(lower_lr=0.05, truncate=7, warm=False, upper_optimizer="sgd"),
}
PROBLEMS = {
    "quadratic": Quadratic(),
    "hypercleaning": Hypercleaning(train=80, validation=40),
    "noisy": noisy(),
    "network": network(),
}


def agree(problem, solver, steps=3):
    found = []
    for engine in ("autograd", "compiled"):
        own = replace(solver, engine=engine)
        state = start(problem, own)
        for _ in range(steps):
            state = own.step(problem, bilevel.Single(), state)
        found.append(state)
    eager, looped = found
    assert eager.counts == looped.counts and eager.numbers.keys() == looped.numbers.keys()
    # A solve that stops at 1e-6 passes rounding on, amplified by the condition of H.
    own = {"rtol": 1e-6, "atol": 1e-9} if solver.upper_optimizer == "adam" else CLOSE
    for name in "xy":
        pair = (list(bilevel.tree.leaves(s.variables[name].value)) for s in found)
        torch.testing.assert_close(*pair, **own)
    assert looped.lower == pytest.approx(eager.lower, rel=1e-9, abs=1e-12)
    assert looped.upper == pytest.approx(eager.upper, rel=1e-9, abs=1e-12)
    for name, number in eager.numbers.items():
        assert looped.numbers[name] == pytest.approx(number, rel=1e-3, abs=1e-8), name


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_loops_agree_with_autograd(problem, solver, uncompiled):
    agree(PROBLEMS[problem], SOLVERS[solver])


@inductor
def test_a_compiled_run_agrees():
    agree(PROBLEMS["noisy"], SOLVERS["aid"], steps=2)


@pytest.mark.slow
@inductor
def test_a_single_number_keeps_its_precision():
    """A loop must return tensors of the types that it takes."""
    zero = torch.zeros(())
    problem = bilevel.Functions(
        lambda x, y: (y["a"] - 1) ** 2 + y["b"].sum() * x,
        lambda x, y: (y["a"] - x) ** 2 + (y["b"] - x).square().sum(),
        zero,
        {"a": zero, "b": torch.zeros(2)},
    )
    solver = AID(lower_lr=0.05, inner_steps=3, engine="compiled")
    found = bilevel.solve(problem, solver, steps=3)
    eager = bilevel.solve(problem, replace(solver, engine="autograd"), steps=3)
    assert found.y["a"].dtype == torch.float32
    torch.testing.assert_close((found.x, found.y), (eager.x, eager.y))


@pytest.mark.slow
@inductor
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_compiled_loops_agree_with_autograd(problem, solver):
    agree(PROBLEMS[problem], SOLVERS[solver])


def parts(flat):
    return [flat[:6].view(2, 3), flat[6:]]


def whole(tensors):
    return torch.cat([p.flatten() for p in tensors])


def product(A):
    return lambda v, fixed: parts(A @ whole(v))


CURVED = torch.diag(torch.tensor([3.0, 1, 2, 5, 4, 2, -1, 6], **DOUBLE))
REGULAR = CURVED.abs() + 0.1 * torch.ones(8, 8, **DOUBLE)


@pytest.mark.parametrize(
    ("A", "tolerance", "damping", "begin", "status"),
    [
        (REGULAR, 1e-6, 0.0, 0.0, LinearStatus.CONVERGED),
        (REGULAR, 0.0, 0.3, 0.1, LinearStatus.STEPS),
        (REGULAR, 0.0, 0.0, 1e6, LinearStatus.STEPS),  # zero is a better start
        (CURVED, 1e-6, 0.0, 0.0, LinearStatus.CURVATURE),
        (CURVED, 1e-6, 1.5, 0.0, LinearStatus.CONVERGED),
        (REGULAR * 1e200, 0.0, 0.0, 0.0, LinearStatus.STEPS),
        (REGULAR * float("nan"), 0.0, 0.0, 0.0, LinearStatus.DIVERGED),
    ],
)
def test_conjugate_gradients_are_those_of_linear(A, tolerance, damping, begin, status):
    b, first = parts(normal(8, seed=3)), parts(begin * normal(8, seed=4))
    steps = 20 if tolerance else 4
    solver = CG(steps=steps + 1, tolerance=tolerance, damping=damping)
    expected = solver.solve(lambda v: product(A)(v, []), b, first)
    assert expected.status is status
    numbers = [torch.tensor(steps), *torch.tensor([tolerance, damping], **DOUBLE)]
    v, (k, stop, size) = loops.conjugate_gradients(product(A), b, first, numbers, [])
    assert int(k) + 1 == expected.products
    named = {LinearStatus.CURVATURE: 1, LinearStatus.DIVERGED: 2}
    assert int(stop) == named.get(status, 0)
    if status is not LinearStatus.DIVERGED:
        torch.testing.assert_close(v, expected.solution, **CLOSE)
        assert float(size) == pytest.approx(expected.residual, rel=1e-6, abs=1e-12)


def test_steps_are_kept_and_gone_back():
    def step(held, fixed):
        return [held[0] * fixed[0] + 1], [held[0].clone()]

    first, twice = [torch.ones(2, **DOUBLE)], [torch.tensor(2.0, **DOUBLE)]
    end, rows = loops.keep(step, 4, first, twice)
    assert [float(p[0]) for p in rows[0]] == [1, 3, 7, 15] and float(end[0][0]) == 31
    again = loops.repeat(lambda held, fixed: step(held, fixed)[0], torch.tensor(4), first, twice)
    assert torch.equal(again[0], end[0])
    told = loops.back(lambda held, row, fixed: [10 * held[0] + row[0]], 4, first, rows, [])
    assert float(told[0][0]) == ((((10 + 15) * 10 + 7) * 10 + 3) * 10) + 1


def test_negative_curvature_is_seen_and_not_a_start(uncompiled):
    lower = lambda x, y: 0.5 * (y[:2].square().sum() - y[2] ** 2) - x * y.sum()  # noqa: E731
    upper = lambda x, y: (y - 1).square().sum()  # noqa: E731
    problem = bilevel.Functions(upper, lower, torch.ones((), **DOUBLE), normal(3))
    agree(problem, AID(lower_lr=0.1, inner_steps=2, upper_optimizer="sgd"))


def test_what_is_not_finite_is_told(uncompiled):
    lower = lambda x, y: (y * 1e200).exp().sum() * x  # noqa: E731
    problem = bilevel.Functions(lambda x, y: y.sum(), lower, torch.ones((), **DOUBLE), normal(3))
    for solver in (AID(engine="compiled"), ITD(engine="compiled")):
        result = bilevel.solve(problem, solver, steps=1)
        assert result.status is bilevel.Status.NONFINITE


def test_one_compiling_for_all_steps(monkeypatch):
    made = []
    monkeypatch.setattr(compiled, "_compiled", lambda f, given: made.append(1) or f)
    bilevel.solve(PROBLEMS["network"], AID(engine="compiled", warm=False), steps=3)
    assert len(made) == 3  # at, descend, solve
    bilevel.solve(PROBLEMS["network"], ITD(engine="compiled"), steps=3)
    assert len(made) == 6  # at, unroll, pull


def test_options_that_do_not_go_together():
    with pytest.raises(bilevel.InputError, match="engine=compiled needs mode=reverse"):
        ITD(engine="compiled", mode="forward")
    with pytest.raises(bilevel.InputError, match="engine=compiled needs products=graph"):
        AID(engine="compiled", products="finite")
    for options in ({"linear": "neumann"}, {"lower_optimizer": "adam"}):
        with pytest.raises(bilevel.InputError, match="linear=cg and lower_optimizer=sgd"):
            AID(engine="compiled", **options)
    from bilevel.problems.box import Box

    assert "engine=compiled needs a lower level" in ITD(engine="compiled").check(Box())[0]
    y0 = torch.nn.Linear(2, 1).double()
    problem = bilevel.Functions(lambda x, y: x, lambda x, y: x, torch.ones((), **DOUBLE), y0)
    with pytest.raises(bilevel.InputError, match="engine=compiled needs x and y to be trees"):
        start(problem, AID(engine="compiled"))
    with pytest.raises(bilevel.InputError, match="on the CPU; use engine=traced"):
        Compiled(lambda x, s, batch: (s[0].sum(), s), [], [torch.ones(2, device="meta")], None)


@inductor
def test_a_failing_compiler_is_told(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.raises(bilevel.InputError, match=r"RuntimeError: no luck.*use engine=traced"):
        bilevel.solve(noisy(), AID(engine="compiled"), steps=1)


@pytest.mark.slow
@inductor
def test_a_missing_compiler_is_told(tmp_path):
    own = {"CXX": "no-such-g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    words = ["problem=quadratic", "solver=aid", "solver.engine=compiled", "steps=1"]
    found = subprocess.run(
        [sys.executable, "-m", "bilevel.run", *words, f"out={tmp_path / 'out'}"],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    told = found.stdout + found.stderr
    assert found.returncode and "use engine=traced" in told and "Traceback" not in told, told


@pytest.mark.slow
@inductor
def test_a_resumed_run_is_the_same(tmp_path):
    problem, solver = Hypercleaning(train=80, validation=40), AID(engine="compiled")
    whole = bilevel.solve(problem, solver, steps=4)
    bilevel.solve(problem, solver, steps=2, checkpoints=tmp_path)
    rest = bilevel.solve(problem, solver, steps=4, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, rest.x) and torch.equal(whole.y, rest.y)


def test_an_old_torch_is_told(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    with pytest.raises(InputError, match=r"needs torch 2.13 or newer, this is 2\.11\.0"):
        bilevel.solve(Quadratic(), AID(engine="compiled"), steps=1)
