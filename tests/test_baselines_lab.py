"""The place where baselines search: what it computes is right, and all of it is counted."""

import collections

import pytest
import torch
from baselines_case import BUDGET, small_problem

from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.baselines import Lab
from bilevel.problems.llm_reweight.baselines.lab import search_tokens, tokens
from bilevel.problems.llm_reweight.tokens import Rows, Stratified, collate, pick


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("baselines"))


def test_mean_gradients_are_those_of_the_mean_loss(problem):
    lab = Lab(problem=problem, budget=BUDGET)
    model = lab.fresh()
    source = problem.rows[0]
    got = lab.gradient(model, source, len(source))
    picks = [(0, i) for i in range(len(source))]
    batch = collate([source], picks, [1.0] * len(picks))
    loss = problem.losses(model, batch).mean()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert lab.tokens == sum(map(len, source.ids))


def test_rows_are_spread_over_a_file_that_takes_turns(problem):
    """Every place is as likely, in as many equal parts, and kinds that take turns are all seen."""
    lab, source = Lab(problem=problem, budget=BUDGET), problem.rows[0]
    ids = [tuple(i for i in row if i) for row in source.ids]
    seen = collections.Counter()
    for draw in range(200):
        (batch,) = lab.rows(source, 10, draw)
        rows = [tuple(i for i in row if i) for row in batch.ids.tolist()]
        places = [ids.index(row) for row in rows]
        assert [p * 10 // len(ids) for p in places] == list(range(10))
        seen.update(places)
    assert len(seen) == len(ids)


def test_tokens_are_those_of_rows_without_padding(problem):
    rows = Rows(
        name="r",
        ids=((1, 2, 3), (1, 2, 3, 4, 5)),
        trained=((False, True, True), (False, False, False, True, True)),
        records=(0, 1),
    )
    assert tokens(collate([rows], [(0, 0), (0, 1)], [0.5, 0.5])) == 8
    lab = Lab(problem=problem, budget=BUDGET)
    *_, last = lab.path(lab.uniform, steps=3)
    assert last.number == 3
    assert lab.tokens == pytest.approx(3 * 6 * sum(lab.lengths) / 3, rel=0.15)


def test_the_cost_of_a_learned_search_is_that_of_its_gradients(problem):
    """Ten steps of ScaleBiO: twenty gradients on 6 training rows, ten on 3 target rows."""
    lab = Lab(problem=problem, budget=BUDGET)
    each = sum(lab.lengths) / 3
    target = sum(map(len, problem.targets[0].rows.ids)) / len(problem.targets[0].rows)
    cost = search_tokens(problem, {"upper_grad": 10, "lower_grad": 20, "sweeps": 20})
    assert cost == pytest.approx(20 * 6 * each + 10 * 3 * target)
    assert search_tokens(problem, {"hvp": 1}) == pytest.approx(2 * 6 * each)


def test_picked_rows_are_those_of_the_batch(problem):
    batch = next(Stratified(problem.rows, rows=[2, 2, 2], seed=0))
    some = pick(batch, torch.tensor([4, 1]))
    assert some.labels == (batch.labels[4], batch.labels[1])
    model = problem.fresh_model(1)
    with torch.no_grad():
        whole = problem.losses(model, batch)
        assert torch.allclose(problem.losses(model, some), whole[[4, 1]], atol=1e-6)


def test_a_trial_is_a_training_and_the_target_loss(problem):
    lab = Lab(problem=problem, budget=BUDGET)
    loss = lab.trial(lab.uniform, 9_000.0)
    assert lab.tokens == pytest.approx(9_000, rel=0.1)
    again = Lab(problem=problem, budget=BUDGET)
    count = min(len(problem.targets[0].rows), int(9_000 / 7 * 3 / 24.5))
    rows = sum(map(len, problem.targets[0].rows.ids)) / len(problem.targets[0].rows)
    count = min(len(problem.targets[0].rows), int(9_000 / 7 / (rows / 3)))
    model = again.train(again.uniform, steps=again.steps(9_000 - count * rows / 3))
    assert count == len(problem.targets[0].rows)  # so that evaluate takes the same rows
    assert loss == pytest.approx(training.evaluate(model, problem.targets[0].rows), abs=1e-6)
