"""Groups, priors and bounds of weights against optimality conditions, closed forms and searches."""

import dataclasses
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import bilevel
from bilevel.errors import InputError
from bilevel.problems.llm_reweight import LLMReweight, weighting
from bilevel.problems.llm_reweight.model import example_losses, tiny_model
from bilevel.problems.llm_reweight.tokens import Stratified
from bilevel.projection import kl_box
from bilevel.run import main
from bilevel.solvers.penalty import scalebio, scalebio_votes

SOURCES = {"sea": 60, "law": 20, "food": 40, "art": 80}
LETTERS = {"sea": "abcde", "law": "fghij", "food": "klmno", "art": "pqrst"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def lines(letters, count):
        words = [["".join(draw.choices(letters, k=4)) for _ in range(8)] for _ in range(count)]
        return "".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words)

    for name, count in SOURCES.items():
        (place / f"{name}.jsonl").write_text(lines(LETTERS[name], count))
    (place / "target.jsonl").write_text(lines(LETTERS["sea"], 40))
    return place


def made(folder, **options):
    return LLMReweight(
        sources=tuple(f"{n}={folder / n}.jsonl" for n in SOURCES),
        target=str(folder / "target.jsonl"),
        **{"max_length": 64, "batch": 8, "target_batch": 4, "width": 16, "verdict": False}
        | options,
    )


def logits(*weights):
    return torch.tensor(weights, dtype=torch.float64).log()


# The projection


@st.composite
def boxes(draw):
    n = draw(st.integers(1, 7))
    numbers = st.lists(st.floats(0.001, 1.0), min_size=n, max_size=n)
    p, inside, down, up = (torch.tensor(draw(numbers), dtype=torch.float64) for _ in range(4))
    p, inside = p / p.sum(), inside / inside.sum()
    low = (inside - down).clamp(min=0.0) if draw(st.booleans()) else inside * 0
    high = (inside + up).clamp(max=1.0) if draw(st.booleans()) else torch.ones(n).double()
    return p, low, high


@given(boxes())
def test_kl_box_meets_its_optimality_conditions(box):
    """w = clip(t p, low, high) with sum 1 is the KKT point of a strictly convex problem."""
    p, low, high = box
    w = kl_box(p, low, high)
    assert abs(float(w.sum()) - 1) < 1e-12
    assert bool((w >= low).all() and (w <= high).all())
    ratio = w / p
    free = (w > low + 1e-13) & (w < high - 1e-13)
    least = ratio[free].min() if free.any() else None
    if least is not None:
        assert float(ratio[free].max() / least) < 1 + 1e-9
        assert bool((ratio[(w <= low + 1e-13) & (low < high)] >= least * (1 - 1e-9)).all())
        assert bool((ratio[(w >= high - 1e-13) & (low < high)] <= least * (1 + 1e-9)).all())
    assert torch.allclose(kl_box(w.clamp(min=1e-100), low, high), w, atol=1e-13)


@settings(max_examples=25)
@given(boxes())
def test_kl_box_is_the_nearest_point(box):
    """Against a general solver of the same problem."""
    p, low, high = box
    own = kl_box(p, low, high)

    def divergence(w):
        return float(torch.special.xlogy(w, w / p).sum())

    start = own.clone()
    found = minimize(
        lambda w: divergence(torch.tensor(w).clamp(min=1e-15)),
        start.numpy() * 0.9 + 0.1 / len(p),
        bounds=list(zip(low.tolist(), high.tolist(), strict=True)),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
    )
    if found.success and abs(found.x.sum() - 1) < 1e-9:
        assert divergence(own) <= divergence(torch.tensor(found.x).clamp(min=1e-15)) + 1e-7


# From options to weights


def test_without_options_weights_are_those_of_softmax_bit_for_bit(folder):
    task = made(folder)
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(task.source_weights(x), x.softmax(0))
    assert task.project_upper(x) is x
    assert torch.equal(task.init(torch.Generator().manual_seed(0))[0], torch.zeros(4).double())
    assert torch.equal(task.weighting.weights(x), x.softmax(0))  # the general way agrees


@pytest.mark.parametrize(("share", "inside"), [("size", (0.75, 0.25)), ("even", (0.5, 0.5))])
def test_a_group_has_one_weight_shared_inside(folder, share, inside):
    task = made(folder, groups=("wet=sea,law",), group_share=share)
    assert task.weighting.entries == ("wet", "food", "art")
    weights = task.source_weights(logits(0.5, 0.3, 0.2))
    assert weights.tolist() == pytest.approx([0.5 * inside[0], 0.5 * inside[1], 0.3, 0.2])
    record = task.metrics(logits(0.5, 0.3, 0.2), torch.nn.Identity())
    assert record["groups"] == pytest.approx({"wet": 0.5, "food": 0.3, "art": 0.2})
    assert list(record["weights"]) == list(SOURCES)


def test_floors_and_ceilings_are_those_that_were_asked_for(folder):
    task = made(folder, min_weight=("0.05", "law=0.2"), max_weight=("sea=0.3",))
    assert task.weighting.low.tolist() == [0.05, 0.2, 0.05, 0.05]
    assert task.weighting.high.tolist() == [0.3, 1.0, 1.0, 1.0]
    weights = task.source_weights(logits(0.97, 0.01, 0.01, 0.01))
    assert weights.tolist() == pytest.approx([0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3])


def test_bounds_of_a_source_bind_its_group(folder):
    """A floor of 0.1 for a source that is a quarter of its group is one of 0.4 for the group."""
    task = made(folder, groups=("wet=sea,law",), min_weight=("law=0.1",), max_weight=("art=0.2",))
    assert task.weighting.low.tolist() == pytest.approx([0.4, 0, 0])
    weights = task.source_weights(logits(0.01, 0.01, 0.98))
    assert float(weights[1]) >= 0.1 - 1e-12 and float(weights[3]) == pytest.approx(0.2)


def test_a_ceiling_on_epochs_is_a_ceiling_on_weights(folder):
    """w N / n <= 2 with N = 100 rows: sea has 60, law 20, food 40, art 80."""
    task = made(folder, max_epochs=2, train_examples=400)
    assert task.weighting.high.tolist() == pytest.approx([0.3, 0.1, 0.2, 0.4])
    assert made(folder, max_epochs=1).weighting.high.tolist() == pytest.approx(
        [0.3, 0.1, 0.2, 0.4]
    )  # as many rows as there are: every row once


def test_the_prior_is_the_start(folder):
    by_size = made(folder, prior=("size",))
    start = by_size.init(torch.Generator().manual_seed(0))[0]
    assert by_size.source_weights(start).tolist() == pytest.approx([0.3, 0.1, 0.2, 0.4])
    given = made(folder, prior=("sea=2", "law=1", "food=1", "art=4"))
    assert given.weighting.prior.tolist() == pytest.approx([0.25, 0.125, 0.125, 0.5])
    bound = made(folder, prior=("size",), max_weight=("0.3",))
    weights = bound.source_weights(bound.weighting.start())
    assert weights.tolist() == pytest.approx([0.3, 2 / 15, 4 / 15, 0.3])


def test_at_most_k_sources_have_weight(folder):
    task = made(folder, max_sources=2)
    weights = task.source_weights(logits(0.4, 0.1, 0.2, 0.3))
    assert weights.tolist() == pytest.approx([4 / 7, 0, 0, 3 / 7])
    floors = made(folder, max_sources=2, min_weight=("law=0.1",))
    assert floors.source_weights(logits(0.5, 0.01, 0.2, 0.29)).tolist() == pytest.approx(
        [0.9, 0.1, 0, 0]
    )
    settled = task.weighting.settled({"sea": 0.3, "law": 0.2, "food": 0.1, "art": 0.4})
    assert settled == pytest.approx({"sea": 3 / 7, "law": 0, "food": 0, "art": 4 / 7})


def test_at_most_k_sources_hold_what_their_ceilings_allow(folder):
    """The two with most weight may hold 0.4 together: one makes room for the roomiest."""
    task = made(folder, max_sources=2, max_weight=("sea=0.2", "art=0.2", "food=0.9", "law=0.5"))
    weights = task.source_weights(logits(0.6, 0.05, 0.05, 0.3))
    assert weights.tolist() == pytest.approx([0.2, 0, 0.8, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=4, max_size=4), st.integers(0, 4))
def test_weights_obey_the_bounds_at_every_x(folder_of_bounds, x, keep):
    task = dataclasses.replace(folder_of_bounds, max_sources=keep)
    x = torch.tensor(x, dtype=torch.float64)
    for point in (x, task.project_upper(x)):
        w = task.source_weights(point)
        assert abs(float(w.sum()) - 1) < 1e-12
        assert bool((w <= task.weighting.high + 1e-15).all())
        kept = w[w > 0] if keep else w
        assert len(kept) <= (keep or 4) and float(w[0]) >= 0.1
    twice = task.project_upper(task.project_upper(x))
    assert torch.allclose(twice, task.project_upper(x), rtol=1e-10)


@pytest.fixture(scope="module")
def folder_of_bounds(folder):
    return made(folder, min_weight=("sea=0.1",), max_weight=("law=0.9", "sea=1", "art=0.95"))


# Gradients


@pytest.fixture(scope="module")
def pair(folder):
    task = made(folder)
    y, z = (tiny_model(len(task.tokenizer), layers=1, width=16, seed=s) for s in (1, 2))
    batch = next(Stratified(task.rows, rows=[3] * 4, seed=0))
    with torch.no_grad():
        gaps = example_losses(y, batch).double() - example_losses(z, batch).double()
    return y, z, batch, torch.stack([gaps[batch.source == s].mean() for s in range(4)])


def gap_gradient(task, x, pair):
    y, z, batch, _ = pair
    x = x.clone().requires_grad_()
    (task.lower(x, y, batch) - task.lower(x, z, batch)).backward()
    return x.grad


def test_the_gradient_of_a_group_is_that_of_its_mixture(folder, pair):
    """dG = W_G (D_G - sum W D) with D_G the mean of d by the shares inside, float32 losses."""
    task = made(folder, groups=("wet=sea,law",))
    x, d = logits(0.5, 0.3, 0.2), pair[3]
    inside = torch.stack([0.75 * d[0] + 0.25 * d[1], d[2], d[3]])
    w = x.softmax(0)
    assert torch.allclose(gap_gradient(task, x, pair), w * (inside - w @ inside), atol=1e-6)


def test_the_gradient_inside_the_bounds_is_exact(folder, pair):
    task = made(folder, min_weight=("0.05",), max_weight=("0.6",))
    x = logits(0.4, 0.3, 0.2, 0.1)
    eps = 1e-3  # the gap is linear in the weights, smooth in x: O(eps^2) of second derivatives
    y, z, batch, _ = pair
    numeric = []
    for e in torch.eye(4, dtype=torch.float64) * eps:
        with torch.no_grad():
            up = task.lower(x + e, y, batch) - task.lower(x + e, z, batch)
            down = task.lower(x - e, y, batch) - task.lower(x - e, z, batch)
        numeric.append(float(up - down) / (2 * eps))
    assert gap_gradient(task, x, pair).tolist() == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize("options", [{"min_weight": ("0.1",)}, {"max_sources": 2}])
def test_what_is_at_a_bound_still_feels_its_cost(folder, pair, options):
    """G_s / p_s = d_s - const for every source, held or dropped: votes sees true differences."""
    task = made(folder, **options)
    x = task.project_upper(logits(0.9, 0.08, 0.01, 0.01))
    cost = gap_gradient(task, x, pair) / x.softmax(0)
    assert torch.allclose(cost - cost.mean(), pair[3] - pair[3].mean(), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["votes", "adam", "sgd"])
@pytest.mark.parametrize("options", [{"min_weight": ("0.05",)}, {"max_sources": 1}])
def test_a_source_comes_back_from_its_bound(folder, optimizer, options):
    """Costs favor the first source for 250 steps, then the last: the weights follow, and obey."""
    task = made(folder, **options)
    make = bilevel.optimizer_by_name(optimizer, {"votes": 0.1, "adam": 0.1, "sgd": 1.0}[optimizer])
    x = bilevel.Variable("x", task.weighting.start(), make, task.project_upper)
    noise = torch.Generator().manual_seed(0)
    ends = []
    for favored in (0, 3):
        costs = torch.ones(4, dtype=torch.float64)
        costs[favored] = 0.0
        for _ in range(250):
            jitter = 0.1 * torch.randn(4, dtype=torch.float64, generator=noise)
            (task.source_weights(x.value) @ (costs + jitter)).backward()
            x.step()
            w = task.source_weights(x.value).detach()
            assert float(w.min()) >= 0.05 - 1e-15 if "min_weight" in options else True
            assert int((w > 0).sum()) == 1 if "max_sources" in options else True
        ends.append(int(w.argmax()))
        assert float(w.max()) > 0.8
    assert ends == [0, 3]


def test_the_pull_has_the_gradient_of_relative_entropy(folder, pair):
    task = made(folder, prior=("size",), prior_strength=0.7)
    y = pair[0]
    target = next(task.batches(torch.Generator().manual_seed(0))[0])
    x = logits(0.4, 0.3, 0.2, 0.1).requires_grad_()
    task.upper(x, y, target).backward()
    w, prior = x.detach().softmax(0), torch.tensor([0.3, 0.1, 0.2, 0.4], dtype=torch.float64)
    ratio = (w / prior).log()
    assert torch.allclose(x.grad, 0.7 * w * (ratio - w @ ratio), atol=1e-14)
    with torch.no_grad():
        plain = made(folder).upper(x, y, target)
        parts = [task.share(target, i, 2) for i in range(2)]
        whole = sum(task.upper(x, y, part) for part in parts)
        more = float(task.upper(x, y, target) - plain)
        assert more == pytest.approx(0.7 * float(w @ ratio), abs=1e-12)
        assert float(whole) == pytest.approx(float(task.upper(x, y, target)), abs=1e-6)


def test_a_strong_pull_keeps_the_prior(folder):
    results = []
    for strength in (0.0, 100.0):
        task = made(folder, prior=("size",), prior_strength=strength)
        run = bilevel.solve(task, scalebio(warmup=2, upper_lr=0.05), steps=25)
        results.append(run.history[-1]["weights"])
    prior = dict(zip(SOURCES, (0.3, 0.1, 0.2, 0.4), strict=True))
    moved = [max(abs(w[n] - prior[n]) for n in prior) for w in results]
    assert moved[0] > 0.1 > 0.02 > moved[1]


# Runs


@pytest.mark.parametrize("solver", [scalebio_votes, scalebio])
def test_every_step_of_a_run_obeys(folder, solver):
    options = {"groups": ("wet=sea,law",), "min_weight": ("food=0.2",), "max_weight": ("wet=0.5",)}
    task = made(folder, **options)
    result = bilevel.solve(task, solver(warmup=2, upper_lr=0.3), steps=25)
    for record in result.history:
        assert record["groups"]["food"] >= 0.2 - 1e-15
        assert record["groups"]["wet"] <= 0.5 + 1e-15
        assert sum(record["weights"].values()) == pytest.approx(1)
    assert result.history[-1]["groups"]["wet"] == pytest.approx(0.5)  # the right one, at its bound


WRONG = {
    "groups=a": "problem.groups must be name=source,source, got 'a'",
    "groups=a=sae": "no source 'sae'; did you mean 'sea'?",
    "groups=sea=law": "'sea' is the name of a source",
    "groups='a=sea b=sea,law'": "source 'sea' twice, in 'a' and 'b'",
    "weigh=groups": "needs problem.groups",
    "groups=all=sea,law,food,art": "problem.groups leaves one weight, for all sources",
    "weigh=examples batch=1": "problem.batch must be at least 2 with problem.weigh=examples",
    "min_weight=0.3": "problem.min_weight adds up to 1.2 over 4 sources, expected at most 1",
    "max_weight=0.2": "add up to 0.8 over 4 sources, expected at least 1",
    "max_weight=sea=1.5": "problem.max_weight must be from 0 to 1, got sea=1.5",
    "max_weight=sea=0": "leave the source out instead",
    "min_weight=see=0.1": "nothing is called 'see'; did you mean 'sea'?",
    "min_weight=sea=x": "must be name=number or a number, got 'sea=x'",
    "min_weight='sea=0.1 sea=0.2'": "problem.min_weight is given twice for sea",
    "min_weight='0.1 sea=0.3' max_weight=sea=0.2": "floor of sea is 0.3, above its ceiling 0.2",
    "max_epochs=1 train_examples=400": "add up to 0.5 over 4 sources",
    "max_sources=2 min_weight=0.1": "4 of 4 sources weight, but problem.max_sources=2",
    "max_sources=2 max_weight=0.4": "add up to 0.8 over the largest 2 of 4 sources",
    "max_sources=-1": "problem.max_sources must be at least 0, got -1",
    "prior=sea=0.5": "problem.prior lacks law, food, art",
    "prior='sea=0 law=1 food=1 art=1'": "must be positive, got sea=0",
    "prior=0.3": "'size', or name=weight for each, got a bare number",
    "prior_strength=-1": "problem.prior_strength must be at least 0",
    "weigh=examples min_weight=0.1": "problem.min_weight is about weights of sources",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_is_told_before_anything_is_written(folder, tmp_path, capsys, words):
    import shlex

    sources = " ".join(f"{n}={folder / n}.jsonl" for n in SOURCES)
    given = [f"problem.{word}" for word in shlex.split(words)]
    options = ["problem=llm_reweight", f"sources={sources}", f"target={folder / 'target.jsonl'}"]
    options += ["max_length=64", "batch=8", "target_batch=4", "width=16", "verdict=false"]
    assert main([*options, *given, f"out={tmp_path / 'out'}"]) == 2
    assert WRONG[words] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_faults_of_the_bounds_are_told_together(folder):
    task = made(folder, min_weight=("0.4", "see=1"), prior=("sea=1",), max_sources=-2)
    with pytest.raises(InputError) as caught:
        weighting.weighting(dataclasses.replace(task, max_sources=0))
    assert len(caught.value.faults) == 3
