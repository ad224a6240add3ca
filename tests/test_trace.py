"""A trace gives the numbers of autograd, at every stage, or says why it cannot."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

import bilevel
from bilevel.problems.hypercleaning import Hypercleaning
from bilevel.problems.quadratic import Quadratic
from bilevel.solve import start
from bilevel.solvers.implicit import AID
from bilevel.solvers.unrolled import ITD
from bilevel.trace import Stages, Traced, flattened

DOUBLE = {"dtype": torch.float64}
# Kernels run in another order or transposed: a few units in the last place of every sum.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


ROWS = normal(40, 6, seed=9)


def tall(x, s, batch):
    """Products of tall narrow matrices, their softmax, a power, a slice and an unused entry."""
    rows = ROWS
    scores = torch.tanh(rows @ s[0]) @ s[1]
    labels = torch.arange(40) % 3
    loss = (x[0].sigmoid() * cross_entropy(scores, labels, reduction="none")).mean()
    loss = loss + x[1].exp() * s[1].pow(3).sum()
    slope = rows.T @ (log_softmax(rows @ s[0], -1) * x[0][:, None])
    return loss, [slope + s[0].pow(2) * batch["b"], s[1] * loss + log_softmax(scores, 1)[:4] * x[1]]


POINTS = ([normal(40, seed=1), normal(seed=2)], [normal(6, 4, seed=3), normal(4, 3, seed=4)])
BATCH = {"b": normal(6, 4, seed=5), "kind": "any"}


def reference(x, s, v, batch=BATCH):
    x, s = ([p.clone().requires_grad_() for p in part] for part in (x, s))
    scalar, found = tall(x, s, batch)
    pulled = torch.autograd.grad(found, [*s, *x], v)
    return scalar.detach(), [f.detach() for f in found], list(pulled[:2]), list(pulled[2:])


def test_every_stage_is_autograd():
    x, s = POINTS
    moved = [p + 0.3 for p in x], [p - 0.2 for p in s]
    other = {"b": normal(6, 4, seed=6), "kind": "any"}
    v = [normal(6, 4, seed=7), normal(4, 3, seed=8)]
    traced = Traced(tall, x, s, BATCH)
    assert traced.fits(other) and not traced.fits({"b": normal(2), "kind": "any"})
    assert not traced.fits({"b": normal(6, 4), "kind": "another"})
    for at, batch in (((x, s), BATCH), (moved, other), ((x, moved[1]), BATCH)):
        traced.at(at[0], batch)
        scalar, found, along_s, along_x = reference(*at, v, batch)
        torch.testing.assert_close(traced.scalar(at[1]), scalar, **CLOSE)
        torch.testing.assert_close(traced.values(at[1]), found, **CLOSE)
        values, saved = traced.record(at[1])
        torch.testing.assert_close(values, found, **CLOSE)
        traced.at(x, BATCH)  # what is recorded stays what it was
        torch.testing.assert_close(traced.pull_s(saved, v), along_s, **CLOSE)
        torch.testing.assert_close(traced.pull_x(saved, v), along_x, **CLOSE)
        torch.testing.assert_close(traced.pull(saved, v), (along_s, along_x), **CLOSE)


def test_nothing_is_done_later_than_it_can_be():
    traced = Traced(tall, *POINTS, BATCH)
    counts = {name: code(getattr(traced._stages, name)) for name in ("first", "values", "both")}
    for kernel, stage in (("sigmoid", "first"), ("exp", "first"), ("tanh", "values")):
        assert f"aten.{kernel}.default" in counts[stage]
    for kernel in ("sigmoid", "tanh", "_log_softmax"):
        assert f"aten.{kernel}.default" not in counts["both"]
    assert "aten.sigmoid.default" not in counts["values"]


def test_what_is_cheap_is_done_again_where_a_compiler_fuses():
    def function(x, s, batch):
        u = s[0].exp() * x[0]
        return u.sum(), [u * u]

    given = [normal(3)], [normal(3)], *flattened(None)
    eager, fused = (Stages(function, *given, table) for table in (None, {}))
    assert (len(eager.saved), len(fused.saved)) == (2, 1)  # the exponential and u, or it alone
    env = dict(zip((*fused.x, *fused.s), (*given[0], *given[1]), strict=True))
    expected = (given[1][0].exp() * given[0][0]).square()
    torch.testing.assert_close(fused.values(env), [expected], **CLOSE)


def code(stage):
    return " ".join(str(node.target) for node in stage.code.graph.nodes)


def test_tall_products_run_transposed():
    rows, wide = normal(40, 6), [normal(40, 3)]

    def function(x, s, batch):
        return s[0].sum(), [log_softmax(rows @ s[0][:6], 1)]

    traced = Traced(function, [normal(1)], wide, None)
    traced.at([normal(1)], None)
    (found,) = traced.values(wide)
    assert found.t().is_contiguous()
    torch.testing.assert_close(found, log_softmax(rows @ wide[0][:6], 1), **CLOSE)


@pytest.mark.parametrize(
    "seen",
    [lambda p: p.view(5, 8, 4), lambda p: p.flatten(), lambda p: p.as_strided((40, 2), (4, 2))],
    ids=["view", "flatten", "as_strided"],
)
def test_views_of_transposed_products(seen):
    def function(x, s, batch):
        loss = seen(ROWS @ (s[0] * x[1])).sin().square().mean()
        return loss, [torch.func.grad(lambda y: seen(ROWS @ (y * x[1])).sin().mean())(s[0])]

    x, s = POINTS[0], POINTS[1][:1]
    v = [normal(6, 4, seed=7)]
    traced = Traced(function, x, s, BATCH)
    traced.at(x, BATCH)
    found, saved = traced.record(s)
    own = [[p.clone().requires_grad_() for p in part] for part in (x, s)]
    scalar, expected = function(*own, BATCH)
    options = {"allow_unused": True, "materialize_grads": True}
    pulled = torch.autograd.grad(expected, [*own[1], *own[0]], v, **options)
    torch.testing.assert_close(traced.scalar(s), scalar.detach(), **CLOSE)
    torch.testing.assert_close(found[0], expected[0].detach(), **CLOSE)
    along_s, along_x = traced.pull(saved, v)
    torch.testing.assert_close([*along_s, *along_x], list(pulled), **CLOSE)


@pytest.mark.parametrize(
    ("lower", "words"),
    [
        (lambda x, y: (y * torch.rand(())).square().sum() * x, "draws random numbers"),
        (lambda x, y: (y * y.sum().item()).square().sum() * x, "cannot be traced"),
    ],
)
def test_what_cannot_be_traced_is_said(lower, words):
    one = torch.ones((), **DOUBLE)
    problem = bilevel.Functions(lambda x, y: y.square().sum(), lower, one, one[None])
    with pytest.raises(bilevel.InputError, match=words):
        bilevel.solve(problem, AID(engine="traced"), steps=1)


class Fresh(bilevel.Functions):
    """Every batch is another tensor; from `grows` on of another shape, too."""

    grows = math.inf

    def batches(self, generator):
        return bilevel.Always(), Drawn(self.grows)


class Drawn(bilevel.Stream):
    def __init__(self, grows):
        self.grows, self.count = grows, 0

    def __next__(self):
        self.count += 1
        return normal(
            max(3, 3 + self.count - self.grows) if self.grows < 99 else 3, seed=self.count
        )

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Noisy(Fresh):
    def lower(self, x, y, batch):
        return 0.5 * ((y["a"] - x) - batch[:3] / 9).square().sum() + y["b"].square().sum()


def noisy():
    y0 = {"a": torch.zeros(3, **DOUBLE), "b": torch.ones((), **DOUBLE)}
    upper = lambda x, y: (y["a"] - 1).square().sum() + x.sum() * y["b"]  # noqa: E731
    return Noisy(upper, None, torch.zeros(3, **DOUBLE), y0)


SOLVERS = {
    "aid": AID(lower_lr=0.05),
    "neumann": AID(linear="neumann", lower_lr=0.05, warm=False),
    "asgd": AID(lower_optimizer="asgd", lower_lr=0.05),  # adam would amplify rounding
    "short": AID(linear_steps=3, lower_lr=0.05, upper_optimizer="sgd"),
    "itd": ITD(lower_lr=0.05),
    "heavy": ITD(lower_lr=0.05, momentum=0.5),
    "truncated": ITD(lower_lr=0.05, truncate=7, warm=False),
}
PROBLEMS = {
    "quadratic": Quadratic(),
    "hypercleaning": Hypercleaning(train=80, validation=40),
    "noisy": noisy(),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_engines_agree(problem, solver):
    from dataclasses import replace

    found = []
    for engine in ("autograd", "traced"):
        own = replace(SOLVERS[solver], engine=engine)
        state = start(PROBLEMS[problem], own)
        for _ in range(2):
            state = own.step(PROBLEMS[problem], bilevel.Single(), state)
        found.append(state)
    eager, traced = found
    assert eager.counts == traced.counts and eager.numbers.keys() == traced.numbers.keys()
    # A linear solve that stops at 1e-6 passes rounding on, amplified by the condition of H.
    loose = {"rtol": 1e-6, "atol": 1e-9}
    for name in "xy":
        pair = (list(bilevel.tree.leaves(s.variables[name].value)) for s in found)
        torch.testing.assert_close(*pair, **loose)
    assert eager.lower == pytest.approx(traced.lower, rel=1e-9, abs=1e-12)
    assert eager.upper == pytest.approx(traced.upper, rel=1e-9, abs=1e-12)
    for name, number in eager.numbers.items():
        # lower_gradient of ITD is a difference of two y over a step, good to eps |y| / lr
        assert traced.numbers[name] == pytest.approx(number, rel=1e-3, abs=1e-8), name


def test_it_is_traced_once(monkeypatch):
    made, build = [], Traced.__init__
    monkeypatch.setattr(Traced, "__init__", lambda *a: made.append(1) or build(*a))
    bilevel.solve(noisy(), AID(engine="traced"), steps=4)
    assert len(made) == 1


def test_data_made_at_the_first_call_are_not_made_within_the_trace():
    """Tensors of a trace would stay in the problem and break all that is done with it later."""
    problem = Quadratic(data_seed=11)  # of which nothing is cached yet
    found = [bilevel.solve(problem, AID(engine=e), steps=2).x for e in ("traced", "autograd")]
    assert type(problem.solution().x) is torch.Tensor
    torch.testing.assert_close(*found, **CLOSE)


def test_batches_of_ever_new_shapes_are_refused():
    problem = noisy()
    problem.grows = 4
    with pytest.raises(bilevel.InputError, match="9th kind"):
        bilevel.solve(problem, AID(engine="traced"), steps=2)


def test_options_that_do_not_go_together():
    with pytest.raises(bilevel.InputError, match="mode=reverse"):
        ITD(engine="traced", mode="forward")
    with pytest.raises(bilevel.InputError, match="products=graph"):
        AID(engine="traced", products="finite")
    from bilevel.problems.box import Box

    assert "without constraints" in ITD(engine="traced").check(Box())[0]
    y0 = torch.nn.Linear(2, 1).double()
    problem = bilevel.Functions(lambda x, y: x, lambda x, y: x, torch.ones((), **DOUBLE), y0)
    with pytest.raises(bilevel.InputError, match="trees of tensors"):
        start(problem, AID(engine="traced"))


def test_a_resumed_run_is_the_same(tmp_path):
    problem, solver = Quadratic(), AID(engine="traced")
    whole = bilevel.solve(problem, solver, steps=4)
    bilevel.solve(problem, solver, steps=2, checkpoints=tmp_path)
    rest = bilevel.solve(problem, solver, steps=4, checkpoints=tmp_path, resume=True)
    assert torch.equal(whole.x, rest.x) and torch.equal(whole.y, rest.y)
