"""Baselines that follow the difference of two models' losses, against sums written out."""

import pytest
import torch
from baselines_case import BUDGET, small_problem

from bilevel.problems.llm_reweight.baselines import Lab, find
from bilevel.problems.llm_reweight.baselines.differences import by_source, excess
from bilevel.problems.llm_reweight.baselines.lab import tokens
from bilevel.problems.llm_reweight.tokens import Stratified


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("baselines"))


def test_differences_are_those_of_two_models(problem):
    lab = Lab(problem=problem, budget=BUDGET)
    one, two = problem.fresh_model(1), problem.fresh_model(2)
    batch = next(Stratified(problem.rows, rows=[2, 2, 2], seed=0))
    with torch.no_grad():
        a, b = (problem.losses(m, batch).double() for m in (one, two))
    gaps = excess(lab, a, two, batch)
    assert torch.allclose(gaps, a - b)
    assert lab.tokens == pytest.approx(tokens(batch) / 3)
    wanted = torch.stack([(a - b)[batch.source == k].mean() for k in range(3)])
    assert torch.allclose(by_source(gaps, batch, 3), wanted)


def test_doremi_sees_no_target_and_follows_the_sources_that_lag(problem, monkeypatch):
    """A reference that is worse on one source by construction: weight leaves that source."""

    def never(*arguments):
        raise AssertionError("DoReMi looked at the target")

    monkeypatch.setattr(type(problem), "targets", property(never))

    def gaps(lab, losses, reference, batch):
        return torch.tensor([-1.0, 0.0, 0.5]).double()[batch.source]

    monkeypatch.setattr("bilevel.problems.llm_reweight.baselines.doremi.excess", gaps)
    lab = Lab(problem=problem, budget=BUDGET)
    found = find("doremi:rate=0.1:smoothing=0.1").search(lab)
    steps = int(found.note.split()[-2])
    w, total = torch.ones(3).double() / 3, torch.zeros(3).double()
    for _ in range(steps):
        w = w * torch.tensor([0.0, 0.0, 0.05]).double().exp()  # below zero counts as zero
        w = 0.9 * w / w.sum() + 0.1 / 3
        total += w
    assert [*found.weights.values()] == pytest.approx((total / steps).tolist())


def test_rho_counts_the_rows_that_the_reference_finds_easier(problem, monkeypatch):
    def gaps(lab, losses, reference, batch):
        return torch.tensor([1.0, 2.0, 0.0]).double()[batch.source]

    monkeypatch.setattr("bilevel.problems.llm_reweight.baselines.rho.excess", gaps)
    lab = Lab(problem=problem, budget=BUDGET)
    found = find("rho:pool=2").search(lab).weights  # 4 rows of each source, 6 are kept
    assert found == pytest.approx({"right": 2 / 6, "near": 4 / 6, "wrong": 0.0})
