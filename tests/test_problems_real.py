"""The problems on real data: gradients, contracts, runs by command, and what they promise."""

import contextlib
import dataclasses
import io
import math

import pytest
import torch

import bilevel
from bilevel.options import parse
from bilevel.oracle import Oracle
from bilevel.plugins import find
from bilevel.problems._template import Template
from bilevel.problems.augmentation import Augmentation
from bilevel.problems.denoising import Denoising
from bilevel.problems.few_shot import FewShot
from bilevel.problems.hypercleaning import Hypercleaning
from bilevel.problems.logistic import Logistic
from bilevel.problems.pruning import Pruning
from bilevel.run import main
from bilevel.solver import require
from bilevel.tree import clone, dot, leaves, map_leaves

SMALL = {
    "template": Template(rows=8, features=3),
    "logistic": Logistic(train=60, validation=60),
    "hypercleaning": Hypercleaning(train=60, validation=60),
    "hypercleaning-box": Hypercleaning(train=60, validation=60, weights="box"),
    "hypercleaning-sources": Hypercleaning(train=60, validation=60, weights="simplex", sources=6),
    "few_shot": FewShot(tasks=3, test_tasks=3, hidden=4, queries=3),
    "denoising": Denoising(size=8, start=(-2.0, -2.0)),
    "pruning": Pruning(train=60, validation=60, hidden=4),
    "augmentation": Augmentation(train=20, validation=60, copies=2, trials=1),
}
every = pytest.mark.parametrize("problem", SMALL.values(), ids=SMALL)


def noise(value, seed):
    generator = torch.Generator().manual_seed(seed)
    return map_leaves(
        lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64), value
    )


def plus(a, b, factor):
    return [p.detach() + factor * q for p, q in zip(leaves(a), leaves(b), strict=True)]


def put(value, tensors):
    with torch.no_grad():
        for leaf, t in zip(leaves(value), tensors, strict=True):
            leaf.copy_(t)
    return value


@every
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_gradients_equal_differences(problem, level):
    x, y = map(clone, problem.init(torch.Generator().manual_seed(0)))
    put(y, plus(y, noise(y, 1), 0.1))
    u, v, e = noise(x, 2), noise(y, 3), 1e-6
    found = getattr(Oracle(problem, {}), level)(x, y, None)
    slope = float(dot(found.x, leaves(u)) + dot(found.y, leaves(v)))
    start, values = (clone(x), clone(y)), []
    for sign in (1, -1):
        at = [put(t, plus(s, w, sign * e)) for t, s, w in zip((x, y), start, (u, v), strict=True)]
        values.append(float(getattr(problem, level)(*at, None).detach()))
    # the second term is the rounding of the difference
    size = 1 + abs(slope)
    assert abs((values[0] - values[1]) / (2 * e) - slope) <= 1e-6 * size + 1e-9 * abs(values[0])


@every
def test_starts_are_new_feasible_and_losses_pure(problem):
    x, y = problem.init(torch.Generator().manual_seed(0))
    again = problem.init(torch.Generator().manual_seed(0))
    for one, other in zip((x, y), again, strict=True):
        for a, b in zip(leaves(one), leaves(other), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
            assert a.dtype == torch.float64
    for a, b in zip(leaves(x), leaves(problem.project_upper(x)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    for loss in (problem.upper, problem.lower):
        assert torch.equal(loss(x, y, None), loss(x, y, None)) and loss(x, y, None).dim() == 0


@every
def test_projection_is_idempotent_and_keeps_structure(problem):
    x, _ = problem.init(torch.Generator().manual_seed(0))
    far = problem.project_upper(map_leaves(lambda t: 3 * t, noise(x, 4)))
    twice = problem.project_upper(far)
    for a, b in zip(leaves(far), leaves(twice), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert [t.shape for t in leaves(far)] == [t.shape for t in leaves(x)]


@every
@pytest.mark.parametrize("solver", ["penalty", "aid"])
def test_solvers_run_and_metrics_are_finite(problem, solver):
    wishes = type(problem).solver_options
    made = find("solver", solver)()
    own = {field.name for field in dataclasses.fields(made)}
    made = dataclasses.replace(made, **{k: v for k, v in wishes.items() if k in own})
    result = bilevel.solve(problem, made, steps=12)
    assert result.success
    extra = {k: v for k, v in result.history[-1].items() if k not in result.evidence}
    assert all(math.isfinite(v) for v in extra.values())
    changed = [
        not torch.equal(a, b)
        for a, b in zip(leaves(result.x), leaves(problem.init(torch.Generator())[0]), strict=True)
    ]
    assert any(changed)


COMMANDS = {
    "logistic": ["problem.train=60", "problem.validation=60"],
    "hypercleaning": ["problem.train=60", "problem.validation=60"],
    "few_shot": [
        "problem.tasks=3",
        "problem.test_tasks=3",
        "problem.hidden=4",
        "problem.queries=3",
    ],
    "denoising": ["problem.size=8"],
    "pruning": ["problem.train=60", "problem.validation=60", "problem.hidden=4"],
    "augmentation": ["problem.train=20", "problem.validation=60", "problem.trials=1"],
    "toy": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_writes_a_picture_and_closing_lines(name, tmp_path):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = main([f"problem={name}", *COMMANDS[name], "steps=2", f"out={tmp_path}/run"])
    assert code == 0
    pictures = list((tmp_path / "run").glob("*.png"))
    assert len(pictures) == 1 and pictures[0].stat().st_size > 5000
    lines = text.getvalue().splitlines()
    assert f"picture: {pictures[0]}" in lines and "nan" not in text.getvalue()


def test_the_problem_proposes_options_that_the_command_line_overrides():
    assert parse(["problem=logistic"]).solver.upper_lr == 0.05
    assert parse(["problem=logistic", "solver.upper_lr=0.2"]).solver.upper_lr == 0.2
    assert parse(["problem=denoising", "solver=penalty"]).solver.inner_steps == 20
    known = {
        field.name
        for name in ("aid", "penalty")
        for field in dataclasses.fields(find("solver", name))
    }
    for problem in SMALL.values():
        assert set(type(problem).solver_options) <= known
        require(find("solver", "aid")(**options_for(problem, "aid")))


def options_for(problem, solver):
    own = {field.name for field in dataclasses.fields(find("solver", solver))}
    return {k: v for k, v in type(problem).solver_options.items() if k in own}


@pytest.mark.parametrize("solver", ["penalty", "aid"])
def test_found_corruption_has_an_auroc_of_99_percent(solver):
    problem = Hypercleaning()
    made = find("solver", solver)(**options_for(problem, solver))
    result = bilevel.solve(problem, made, steps=40)
    assert result.history[-1]["auroc"] >= 0.99


@pytest.mark.parametrize("weights", ["sigmoid", "box", "simplex", "sparse"])
def test_wrong_sources_get_less_weight(weights):
    problem = Hypercleaning(train=300, sources=6, weights=weights, keep=3)
    solver = find("solver", "aid")(upper_lr=0.1)
    seen = []

    def look(state, record):
        x = state.variables["x"].value.detach()
        seen.append(float((problem.project_upper(x) - x).abs().max()))
        assert weights != "sparse" or int((x > 0).sum()) <= 3

    result = bilevel.solve(problem, solver, steps=30, callbacks=[look])
    assert max(seen) <= 1e-12  # I21
    assert result.x[:3].max() < result.x[3:].max()
    if weights != "sparse":  # three kept at once by their order, and those dropped cannot return
        assert result.history[-1]["auroc"] == 1.0


def test_learned_strengths_switch_noisy_pixels_off():
    problem = Logistic()
    result = bilevel.solve(problem, find("solver", "aid")(upper_lr=0.1), steps=40)
    strengths, noisy = result.x[:-1], problem.noisy
    assert float(strengths[noisy].mean() - strengths[~noisy].mean()) > 1.0
    learned = bilevel.resolve(problem, result.x)
    single = [
        bilevel.resolve(problem, torch.full_like(result.x, s)).upper for s in (-6.0, -5.0, -4.0)
    ]
    assert learned.upper < 0.9 * min(single)


def test_denoising_gains_decibels():
    problem = Denoising(size=16)
    made = find("solver", "aid")(upper_lr=0.1, inner_steps=20)
    result = bilevel.solve(problem, made, steps=60)
    clean, noisy = problem.data[1]
    before = -10 * math.log10(float((noisy - clean).square().mean()))
    after = -10 * math.log10(float((problem.denoise(result.x, noisy) - clean).square().mean()))
    assert after > before + 3


def test_the_least_lower_loss_of_denoising_is_smooth_enough_for_its_step():
    """H is at most 17 on all of X, as the docstring says."""
    problem = Denoising(size=8)
    x = problem.project_upper(torch.tensor([9.0, -9.0], dtype=torch.float64))
    flat = torch.full((4, 8, 8), 0.5, dtype=torch.float64)  # no slope: where the curvature is most
    bend = Oracle(problem, {}).curvature(x, flat, None)
    v = noise(flat, 0)
    for _ in range(200):
        v = v / v.norm()
        (image,) = bend.hvp([v])
        size, v = float((v * image).sum()), image
    assert 10 < size <= 17


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (Template, {"rows": 0}, "rows must be at least 1"),
        (Logistic, {"train": 1797}, "leave test rows"),
        (Logistic, {"start": 3.0}, "start must be between"),
        (Hypercleaning, {"corrupted": 1.0, "decay": 0.0}, "corrupted must be in.*\n.*decay"),
        (Hypercleaning, {"sources": 2000}, "sources must be at most train"),
        (FewShot, {"ways": 6}, "ways must be between 2 and 5"),
        (FewShot, {"queries": 80}, "add up to at most 80"),
        (Denoising, {"size": 1}, "size must be between"),
        (Pruning, {"keep": 1.0}, "keep must be in"),
        (Augmentation, {"copies": 0}, "copies must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(family, options, words):
    with pytest.raises(bilevel.InputError, match=words):
        family(**options)
