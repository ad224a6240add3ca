"""Baselines that compare gradients, against differences, dense matrices and optimizers."""

import math

import pytest
import torch
from baselines_case import BUDGET, small_problem

from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.baselines import Lab, fed_back, find, less
from bilevel.problems.llm_reweight.baselines.sketch import Sketch
from bilevel.problems.llm_reweight.tokens import collate, pick


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("baselines"))


def test_influence_is_the_first_order_change_of_the_target_loss(problem):
    """a_s against a difference of the target loss along -grad l_s, in float64."""
    lab = Lab(problem=problem, budget=BUDGET)
    found = find("influence:measure=inner").search(lab)
    shown = dict(part.rsplit(" ", 1) for part in found.note.removeprefix("inner: ").split(", "))
    again = Lab(problem=problem, budget=BUDGET)
    model = again.train(again.uniform, steps=again.steps(0.75 * BUDGET)).double()
    target = sum(map(len, problem.targets[0].rows.ids)) / len(problem.targets[0].rows)
    count = int(0.25 * BUDGET / (sum(again.lengths) + 3**0.5 * target))
    parameters = list(model.parameters())

    def target_loss():
        parts = list(again.rows(problem.targets[0].rows, math.ceil(3**0.5 * count)))
        with torch.no_grad():
            return sum((b.share * model_losses(model, b)).sum() for b in parts)

    for name, source in zip(problem.names, problem.rows, strict=True):
        parts = list(again.rows(source, count))
        loss = sum((b.share * model_losses(model, b)).sum() for b in parts)
        gradient = torch.autograd.grad(loss, parameters)
        size = 1e-4
        ends = []
        for sign in (1, -2):
            for p, g in zip(parameters, gradient, strict=True):
                p.data.sub_(sign * size * g)
            ends.append(float(target_loss()))
        for p, g in zip(parameters, gradient, strict=True):
            p.data.sub_(size * g)
        along = (ends[1] - ends[0]) / (2 * size)
        assert float(shown[name]) == pytest.approx(along, rel=0.01)  # three digits are shown


def model_losses(model, batch):
    """In float64, since `token_losses` takes float32."""
    logits = model(input_ids=batch.ids[:, :-1]).logits.transpose(1, 2)
    each = torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:], reduction="none")
    each = each * batch.trained[:, 1:]
    return each.sum(1) / batch.trained[:, 1:].sum(1)


def test_sharpness_is_a_power_of_the_score(problem):
    weights = [
        find(word).search(Lab(problem=problem, budget=BUDGET)).weights
        for word in ("influence", "influence:sharpness=2")
    ]
    squares = {n: w**2 for n, w in weights[0].items()}
    for name, square in squares.items():
        assert weights[1][name] == pytest.approx(square / sum(squares.values()))


def test_fed_back_influence_trains_on_the_weights_it_found(problem, monkeypatch):
    """The shares of each round are the mix of the last ones and of cosines computed apart."""
    shares, models = [], []

    class Drawn(training.Drawn):
        def __init__(self, rows, weights, **options):
            shares.append(list(weights))
            super().__init__(rows, weights, **options)

    def spy(lab, model, count, *, measure, draw):
        models.append([p.detach().clone() for p in model.parameters()])
        assert draw == len(models) - 1  # other rows in every round
        more = math.ceil(3**0.5 * count)
        target = torch.cat(
            [g.flatten() for g in lab.gradient(model, problem.targets[0].rows, more, draw)]
        )
        own = [
            torch.cat([g.flatten() for g in lab.gradient(model, rows, count, draw)])
            for rows in problem.rows
        ]
        return [float(torch.cosine_similarity(target, g, dim=0)) for g in own]

    def search():
        lab = Lab(problem=problem, budget=BUDGET)
        return find("influence_fed_back:rounds=3:keep=0.25").search(lab).weights

    expected = search()
    monkeypatch.setattr(training, "Drawn", Drawn)
    monkeypatch.setattr(fed_back, "scores", spy)
    found = search()
    assert found == pytest.approx(expected, rel=1e-5)
    assert shares[0] == [1 / 3] * 3 and len(models) == 3
    assert not all(map(torch.equal, models[0], models[1]))  # it goes on training
    last = {n: 2 * w - s for (n, w), s in zip(found.items(), shares[2], strict=True)}
    assert sum(last.values()) == pytest.approx(1.0) and min(last.values()) >= 0
    for before, after in ((shares[0], shares[1]), (shares[1], shares[2])):
        new = [(a - 0.25 * b) / 0.75 for a, b in zip(after, before, strict=True)]
        assert sum(new) == pytest.approx(1.0) and min(new) >= 0
    assert shares[2][0] > shares[1][0] > 1 / 3 > shares[2][2]


def dense(sketch, sizes):
    """[size, entries], the matrix that the sketch of parameters of these sizes stands for."""
    matrix = torch.zeros(sketch.size, sum(sizes))
    start = 0
    for number, entries in enumerate(sizes):
        places, signs = Sketch(sketch.size, seed=sketch.seed).draw(number, entries)
        matrix[places, start + torch.arange(entries)] = signs
        start += entries
    return matrix


def test_the_streamed_projection_is_the_dense_one(problem):
    """The hooked backward pass of one row, against the matrix times the whole gradient."""
    model = problem.fresh_model(3)
    moving = list(model.parameters())
    batch = collate([problem.rows[0]], [(0, 5)], [1.0])
    sketch = Sketch(64, seed=7)
    streamed = less.projected(
        lambda: problem.losses(model, batch).sum(), moving, sketch, lambda p, g: g
    )
    assert all(p.grad is None for p in moving)
    loss = problem.losses(model, batch).sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, moving)])
    matrix = dense(sketch, [p.numel() for p in moving])
    assert matrix.abs().sum(0).eq(1).all()  # one place for each entry
    assert torch.allclose(streamed, matrix @ gradient, atol=1e-5)
    plain = problem.losses(model, batch).sum()
    plain.backward()
    assert all(p.grad is not None for p in moving)  # the hooks are gone


def test_projections_keep_inner_products_on_average():
    """Over 400 seeds: mean <g, g'>, deviation of the mean below sqrt(2 / size / 400) |g| |g'|."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, generator=generator)
    b = 0.5 * a + torch.randn(500, generator=generator)
    found = []
    for seed in range(400):
        sketch, one, two = Sketch(32, seed=seed), torch.zeros(32), torch.zeros(32)
        for number, part in enumerate((slice(0, 200), slice(200, 500))):
            sketch.add(one, number, a[part])
            sketch.add(two, number, b[part])
        found.append(float(one @ two))
    mean, allowed = sum(found) / 400, (2 / 32 / 400) ** 0.5 * float(a.norm() * b.norm())
    assert abs(mean - float(a @ b)) < 4 * allowed
    spread = torch.tensor(found).std()
    assert spread < 1.2 * (2 / 32) ** 0.5 * float(a.norm() * b.norm())


def test_parameters_and_seeds_are_projected_apart():
    first = Sketch(1000, seed=1).draw(0, 500)
    for other in (Sketch(1000, seed=1).draw(1, 500), Sketch(1000, seed=2).draw(0, 500)):
        same = [float((a == b).double().mean()) for a, b in zip(first, other, strict=True)]
        assert same[0] < 0.01  # one in a thousand by chance
        assert abs(same[1] - 0.5) < 0.1  # four deviations of 500 coins


def test_a_projection_too_large_to_remember_is_drawn_again(monkeypatch):
    remembered, drawn = Sketch(8, seed=1), Sketch(8, seed=1)
    remembered.draw(0, 30)
    monkeypatch.setattr("bilevel.problems.llm_reweight.baselines.sketch.KEPT", 10)
    totals = [torch.zeros(8), torch.zeros(8)]
    for sketch, total in zip((remembered, drawn), totals, strict=True):
        for _ in range(2):
            sketch.add(total, 0, torch.arange(30.0))
    assert not drawn._held
    assert torch.equal(*totals)


def test_the_direction_of_adam_is_the_step_it_takes(problem):
    """A step of AdamW of torch without decay on the same gradient moves by -lr times it."""
    p = torch.randn(7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0)
    for k in range(3):
        p.grad = torch.full_like(p, 1.0 + k)
        optimizer.step()
    gradient = torch.linspace(-1, 1, 7)
    wanted = less.adam_direction(optimizer)(p, gradient)
    before = p.detach().clone()
    p.grad = gradient.clone()
    optimizer.step()
    assert torch.allclose(p.detach() - before, -0.1 * wanted, atol=1e-6)


def test_scores_of_rows_are_sums_of_cosines_over_checkpoints(problem):
    """One source again with a dense projection, at checkpoints in the middle of equal parts."""
    method = find("less:checkpoints=2:rows=9:size=128")
    got = method.scores(Lab(problem=problem, budget=BUDGET))
    lab = Lab(problem=problem, budget=BUDGET)
    steps = lab.steps(0.6 * BUDGET)
    total = torch.zeros(9)
    for step in lab.path(lab.uniform, steps=steps):
        if step.number not in (steps // 4 + 1, 3 * steps // 4 + 1):
            continue
        moving = list(step.model.parameters())
        matrix = dense(Sketch(128, seed=0), [p.numel() for p in moving])
        state = step.optimizer.state

        def gradients(source, model=step.model, moving=moving):
            for batch in lab.rows(source, 9):
                for i in range(len(batch.ids)):
                    loss = problem.losses(model, pick(batch, torch.tensor([i]))).sum()
                    yield torch.autograd.grad(loss, moving)

        def update(p, g, state=state):
            t = float(state[p]["step"]) + 1
            m = (0.9 * state[p]["exp_avg"] + 0.1 * g) / (1 - 0.9**t)
            v = (0.999 * state[p]["exp_avg_sq"] + 0.001 * g * g) / (1 - 0.999**t)
            return m / (v.sqrt() + 1e-8)

        def flat(tensors):
            return torch.cat([t.flatten() for t in tensors])

        target = matrix @ torch.stack([flat(g) for g in gradients(problem.targets[0].rows)]).mean(0)
        for i, row in enumerate(gradients(problem.rows[0])):
            own = matrix @ flat([update(p, g) for p, g in zip(moving, row, strict=True)])
            cosine = torch.nn.functional.cosine_similarity(own, target, dim=0)
            total[i] += step.optimizer.param_groups[0]["lr"] * cosine
    assert len(got[0]) == 9
    assert torch.allclose(got[0], total, atol=1e-6)
