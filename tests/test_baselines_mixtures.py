"""Baselines that try mixtures, against other optimizers and losses that are known."""

import pytest
import torch
from baselines_case import BUDGET, NAMES, small_problem
from scipy.optimize import minimize

from bilevel.problems.llm_reweight.baselines import Lab, find, regmix
from bilevel.problems.llm_reweight.baselines.mixmin import log_likelihoods, simplex_fit
from bilevel.problems.llm_reweight.baselines.random_search import dirichlet
from bilevel.problems.llm_reweight.tokens import Rows, collate


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("baselines"))


def test_the_fit_of_mixtures_is_that_of_another_optimizer():
    """Random predictions of five models; SLSQP of scipy on the same convex function."""
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(200, 5, generator=generator, dtype=torch.float64) * 2 - 3
    logs[:, 4] -= 4.0  # so that one weight ends at zero
    shares = torch.rand(200, generator=generator, dtype=torch.float64)
    shares /= shares.sum()
    w, gap = simplex_fit(logs, shares, tolerance=1e-9)
    p = logs.exp().numpy()

    def loss(v):
        return float(-(shares.numpy() * torch.tensor(p @ v).log().numpy()).sum())

    other = minimize(
        loss,
        [0.2] * 5,
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert gap <= 1e-9
    assert -1e-7 < loss(w.numpy()) - other.fun < 1e-9
    assert abs(w.numpy() - other.x).max() < 1e-4  # the square root of ftol over the curvature
    assert w[4] < 1e-4


def test_the_bound_on_the_fit_holds_before_it_is_reached():
    logs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.4]], dtype=torch.float64).log()
    shares = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)

    def loss(w):
        return float(-(shares * (logs.exp() @ w).log()).sum())

    best = loss(simplex_fit(logs, shares, tolerance=1e-12, iterations=100_000)[0])
    for iterations in (2, 5, 20):  # the bound is that of the weights before the last update
        w, gap = simplex_fit(logs, shares, tolerance=0.0, iterations=iterations)
        before = simplex_fit(logs, shares, tolerance=0.0, iterations=iterations - 1)[0]
        assert 0 <= loss(w) - best <= loss(before) - best <= gap
        at = before.clone().requires_grad_()
        (slope,) = torch.autograd.grad(-(shares * (logs.exp() @ at).log()).sum(), at)
        assert gap == pytest.approx(float(before @ slope - slope.min()))  # to the best corner


def test_log_likelihoods_have_the_mean_of_the_losses(problem):
    """The mean over rows of each row's mean over trained tokens, padding and prompts left out."""
    rows = Rows(
        name="r",
        ids=((5, 6, 7, 8, 9), (5, 7, 6), (9, 5, 8, 6)),
        trained=((False, True, True, True, True), (False, True, True), (False, False, False, True)),
        records=(0, 1, 2),
    )
    batch = collate([rows], [(0, 0), (0, 1), (0, 2)], [1 / 3] * 3)
    model = problem.fresh_model(1)
    values, shares = log_likelihoods(model, batch)
    assert len(values) == len(shares) == 4 + 2 + 1
    mean = problem.losses(model, batch).detach().double().mean()
    assert float(-(values * shares).sum()) == pytest.approx(float(mean), abs=1e-6)


def test_ridge_and_its_errors_on_left_out_rows_are_those_of_scikit_learn():
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]).double() + 3.0
    y += 0.3 * torch.randn(16, generator=generator, dtype=torch.float64)
    predict, left = regmix.ridge(x, y)
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    errors = {}
    for c in regmix.PENALTIES:
        found = cross_val_predict(Ridge(alpha=16 * c), z, y.numpy(), cv=LeaveOneOut())
        errors[c] = float(((found - y.numpy()) ** 2).sum()), found
    best = min(errors, key=lambda c: errors[c][0])
    wanted = Ridge(alpha=16 * best).fit(z, y.numpy()).predict(z)
    assert torch.allclose(predict(x), torch.from_numpy(wanted), atol=1e-9)
    assert float((left - y).square().sum()) == pytest.approx(errors[best][0], rel=1e-9)
    assert torch.allclose(left, torch.from_numpy(errors[best][1]), atol=1e-9)


@pytest.mark.parametrize("model", ["ridge", "quadratic", "boosting"])
def test_regmix_finds_the_mixture_of_a_known_loss(problem, monkeypatch, model):
    """A loss that is lowest at one corner, in place of trainings."""
    value = {"right": 1.0, "near": 0.6, "wrong": 0.0}

    def loss(lab, mixture, spend):
        return -sum(value[n] * w for n, w in mixture.items())

    monkeypatch.setattr(Lab, "trial", loss)
    lab = Lab(problem=problem, budget=BUDGET)
    weights = find(f"regmix:model={model}:runs=24").search(lab).weights
    assert weights["right"] > 0.6
    assert weights["wrong"] < 0.2


def test_features_of_mixtures_are_centered_log_ratios():
    w = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = regmix.features(w, squares=True)
    assert torch.allclose(found[:, :3].sum(1), torch.zeros(2).double(), atol=1e-12)
    ratio = torch.tensor((0.5 + 0.01) / (0.3 + 0.01)).double().log()
    assert torch.allclose(found[0, 0] - found[0, 1], ratio)
    assert torch.allclose(found[:, 3:], found[:, :3] ** 2)


def test_random_search_takes_the_best_of_its_draws(problem, monkeypatch):
    seen = []

    def loss(lab, mixture, spend):
        seen.append(mixture)
        assert spend == BUDGET / 5
        return abs(mixture["near"] - 0.4)

    monkeypatch.setattr(Lab, "trial", loss)
    found = find("random:runs=5").search(Lab(problem=problem, budget=BUDGET)).weights
    assert len(seen) == 5
    assert seen[0] == pytest.approx(dict.fromkeys(NAMES, 1 / 3))
    assert found == min(seen, key=lambda m: abs(m["near"] - 0.4))


def test_draws_of_a_dirichlet_have_its_mean_and_variance(problem):
    """Dirichlet(c, c, c): mean 1/3, variance 2/9 / (3c + 1); four deviations of 4,000 draws."""
    lab = Lab(problem=problem, budget=1.0)
    for c in (1.0, 4.0):
        w = dirichlet(lab, 4000, c)
        variance = 2 / 9 / (3 * c + 1)
        assert torch.allclose(w.sum(1), torch.ones(4000).double())
        assert (w.mean(0) - 1 / 3).abs().max() < 4 * (variance / 4000) ** 0.5
        assert (w.var(0) / variance - 1).abs().max() < 0.15


def test_single_sources_and_leave_one_out(problem, monkeypatch):
    value = {"right": 1.0, "near": 0.6, "wrong": 0.1}

    def loss(lab, mixture, spend):
        return 5 - sum(value[n] * w for n, w in mixture.items())

    monkeypatch.setattr(Lab, "trial", loss)
    lab = Lab(problem=problem, budget=BUDGET)
    found = find("single").search(lab)
    assert found.weights == {"right": 1.0, "near": 0.0, "wrong": 0.0}
    assert found.note == "target loss alone: right 4.000, near 4.400, wrong 4.900"
    harm = {n: (sum(value.values()) / 3) - (sum(value.values()) - v) / 2 for n, v in value.items()}
    positive = {n: max(h, 0.0) for n, h in harm.items()}
    wanted = {n: h / sum(positive.values()) for n, h in positive.items()}
    assert find("leave_one_out").search(lab).weights == pytest.approx(wanted)
