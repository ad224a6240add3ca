"""Baselines against independent answers: other optimizers, dense algebra, counts by hand."""

import json
import random

import pytest
import torch
from scipy.optimize import minimize

from bilevel import InputError
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.llm_reweight.baselines import METHODS, Lab, find
from bilevel.problems.llm_reweight.baselines.lab import search_tokens, tokens
from bilevel.problems.llm_reweight.baselines.mixmin import log_likelihoods, simplex_fit
from bilevel.problems.llm_reweight.tokens import Rows, collate

NAMES = ("right", "near", "wrong")
BUDGET = 30_000.0


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


def test_influence_is_the_first_order_change_of_the_target_loss(problem):
    """a_s against a difference of the target loss along -grad l_s, in float64."""
    lab = Lab(problem=problem, budget=BUDGET)
    found = find("influence:measure=inner").search(lab)
    shown = dict(part.rsplit(" ", 1) for part in found.note.removeprefix("inner: ").split(", "))
    again = Lab(problem=problem, budget=BUDGET)
    model = again.train(again.uniform, steps=again.steps(0.75 * BUDGET)).double()
    count = int(0.25 * BUDGET / (sum(again.lengths) * 4 / 3))
    parameters = list(model.parameters())

    def target_loss():
        parts = list(again.rows(problem.target_rows, count))
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


TRAINED = [n for n in METHODS if n not in ("uniform", "size", "temperature", "given", "tpe")]


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
    target = sum(map(len, problem.target_rows.ids)) / len(problem.target_rows)
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
