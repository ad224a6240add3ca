"""Baselines against independent answers: other optimizers, dense algebra, counts by hand."""

import collections
import json
import math
import random

import pytest
import torch
from scipy.optimize import minimize

from bilevel import InputError
from bilevel.problems.llm_reweight import LLMReweight, training
from bilevel.problems.llm_reweight.baselines import METHODS, Lab, fed_back, find, less, regmix
from bilevel.problems.llm_reweight.baselines.differences import by_source, excess
from bilevel.problems.llm_reweight.baselines.lab import search_tokens, tokens
from bilevel.problems.llm_reweight.baselines.mixmin import log_likelihoods, simplex_fit
from bilevel.problems.llm_reweight.baselines.random_search import dirichlet
from bilevel.problems.llm_reweight.baselines.sketch import Sketch
from bilevel.problems.llm_reweight.tokens import Rows, Stratified, collate, pick

NAMES = ("right", "near", "wrong")
BUDGET = 20_000.0


def write_sources(folder, records=60):
    """The target speaks the words of `right`; `near` has half of them, `wrong` none."""
    draw = random.Random(0)
    right, wrong = (["".join(draw.choices(s, k=4)) for _ in range(12)] for s in ("abcde", "vwxyz"))
    words = {"right": right, "near": right[:6] + wrong[:6], "wrong": wrong, "target": right}
    for name, own in words.items():
        rows = [{"text": " ".join(draw.choices(own, k=20))} for _ in range(records)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    write_sources(folder)
    options = {"width": 16, "layers": 1, "max_length": 24, "batch": 6, "target_batch": 3}
    found = LLMReweight(
        sources=tuple(str(folder / f"{n}.jsonl") for n in NAMES),
        target=str(folder / "target.jsonl"),
        verdict_lr=1e-2,
        **options,
    )
    found.prepare()
    return found


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


FREE = ("uniform", "size", "temperature", "given", "tpe", "doremi")  # no training, or no target
TRAINED = [name for name in METHODS if name not in FREE]


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_finds_the_right_source_within_its_budget(problem, name):
    lab = Lab(problem=problem, budget=BUDGET, seed=1)
    weights = find(name).search(lab).weights
    assert sum(weights.values()) == pytest.approx(1.0)
    assert min(weights.values()) >= 0
    assert weights["right"] > weights["wrong"]
    assert 0.3 * BUDGET < lab.tokens < 1.05 * BUDGET


def test_searches_are_a_function_of_their_seed(problem):
    found = [
        find("mixmin").search(Lab(problem=problem, budget=BUDGET / 3, seed=seed)).weights
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


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


def test_fixed_weights(problem, tmp_path):
    sizes = [len(rows) for rows in problem.rows]
    lab = Lab(problem=problem, budget=BUDGET)
    assert [*find("uniform").search(lab).weights.values()] == [1 / 3] * 3
    found = find("size").search(lab).weights
    assert [*found.values()] == pytest.approx([n / sum(sizes) for n in sizes])
    roots = [n**0.5 for n in sizes]
    found = find("temperature").search(lab).weights
    assert [*found.values()] == pytest.approx([r / sum(roots) for r in roots])
    (tmp_path / "w.json").write_text('{"right": 3, "wrong": 1}')
    found = find(f"given:file={tmp_path / 'w.json'}").search(lab).weights
    assert found == {"right": 0.75, "near": 0.0, "wrong": 0.25}
    body = {"sources": [{"name": "near", "weight": 0.25}, {"name": "wrong", "weight": 0.75}]}
    (tmp_path / "w.json").write_text(json.dumps(body))
    found = find(f"given:file={tmp_path / 'w.json'}").search(lab).weights
    assert found == {"right": 0.0, "near": 0.25, "wrong": 0.75}
    assert lab.tokens == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"right": -1, "near": 2}', "expected numbers of at least 0, got right: -1"),
        ('{"right": 0}', "all weights are 0"),
        ('{"left": 1}', "has weights for left, but the sources are right, near, wrong"),
        ("[1, 2]", "holds no weights"),
        ('{"right": ', "cannot be read"),
    ],
)
def test_faults_of_given_weights_are_told(problem, tmp_path, body, words):
    (tmp_path / "w.json").write_text(body)
    faults = find(f"given:file={tmp_path / 'w.json'}").check(problem.names)
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("mixmim", "did you mean 'mixmin'? Choices: uniform, size"),
        ("influence:sharpnes=2", "did you mean 'influence:sharpness'?"),
        ("influence:sharpness=much", "influence:sharpness must be a number, got 'much'"),
        ("influence:sharpness=-1", "influence.sharpness must be positive, got -1"),
        ("influence:measure=angle", "must be one of cosine, inner"),
        ("uniform:a=1", "it has none"),
    ],
)
def test_unknown_methods_and_options_are_told(word, words):
    with pytest.raises(InputError) as error:
        find(word)
    assert words in str(error.value)


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


def test_the_parzen_estimator_needs_optuna(problem):
    pytest.importorskip("optuna")
    lab = Lab(problem=problem, budget=BUDGET)
    weights = find("tpe").search(lab).weights
    assert weights["right"] > weights["wrong"]


def test_the_learned_search_is_that_of_a_run(problem):
    """The same weights as `solve` gives with as many steps; scalebio takes the run's lower_lr."""
    import bilevel
    from bilevel.problems.llm_reweight.spread import averaged_weights
    from bilevel.solvers.penalty import scalebio, scalebio_votes

    budget = search_tokens(problem, {"upper_grad": 31, "lower_grad": 62})
    for word, own, made in (
        ("learned", None, scalebio_votes()),
        ("learned", scalebio(upper_lr=0.05), scalebio(upper_lr=0.05)),
        ("scalebio", scalebio_votes(lower_lr=2e-3), scalebio(lower_lr=2e-3)),
    ):
        lab = Lab(problem=problem, budget=budget, seed=4, solver=own)
        found = find(word).search(lab).weights
        result = bilevel.solve(problem, made, steps=31, seed=4)
        assert found == averaged_weights(result.history)
        assert lab.tokens == budget
