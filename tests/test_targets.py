"""Several targets against closed forms, enumeration, and each of them alone."""

import itertools
import json
import math
import random
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.errors import InputError
from bilevel.hypergradient import hypergradient
from bilevel.problems.llm_reweight import LLMReweight, paths, targets
from bilevel.problems.llm_reweight.baselines.lab import Lab, search_tokens
from bilevel.problems.llm_reweight.model import example_losses, tiny_model
from bilevel.problems.llm_reweight.survey import survey, table
from bilevel.problems.llm_reweight.targets import allot, named
from bilevel.problems.llm_reweight.tokens import Rows, Stratified
from bilevel.solvers.penalty import scalebio

LETTERS = {"sea": "abcde", "law": "fghij", "food": "klmno"}
TARGETS = {"math": ("abc", 48), "code": ("fgh", 8), "chat": ("abcdefghij", 20)}
WEIGHTS = {"math": 0.5, "code": 0.125, "chat": 0.375}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def write(name, letters, count):
        words = [
            ["".join(draw.choices(letters, k=4)) for _ in range(draw.randint(3, 9))]
            for _ in range(count)
        ]
        rows = "".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words)
        (place / f"{name}.jsonl").write_text(rows)

    for name, letters in LETTERS.items():
        write(name, letters, 40)
    for name, (letters, count) in TARGETS.items():
        write(name, letters, count)
        write(f"{name}-test", letters, 6)
    return place


def made(folder, names=tuple(TARGETS), kind=LLMReweight, **options):
    small = {"max_length": 32, "batch": 6, "target_batch": 8, "width": 16, "verdict": False}
    small |= {"target_weight": ("math=4", "chat=3")} if len(names) == 3 else {}
    given_ = {
        "sources": tuple(f"{n}={folder / n}.jsonl" for n in LETTERS),
        "target": tuple(f"{n}={folder / n}.jsonl" for n in names),
        "test": tuple(f"{n}={folder / n}-test.jsonl" for n in names),
    }
    return kind(**given_ | small | options)


# What an option names


def test_names_and_paths_are_told_from_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.jsonl", "x=y.jsonl", "a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("")
    alone = ("a b.jsonl", "x=y.jsonl", "gone.jsonl", "gone too.jsonl", "", "it's")
    assert all(named(path) == {"target": path} for path in alone)
    assert all(targets.is_one(path) for path in alone)
    both = {"m": "a b.jsonl", "b": "b.jsonl"}
    assert named("m='a b.jsonl' b.jsonl") == named(("m=a b.jsonl", "b.jsonl")) == both
    assert named(both) == both and named("a.jsonl b.jsonl") == {"a": "a.jsonl", "b": "b.jsonl"}
    assert named("m=gone.jsonl") == {"m": "gone.jsonl"}
    assert named("p/q=1/t.jsonl") == {"t": "p/q=1/t.jsonl"}  # no name has a slash
    records = [{"text": "a"}]
    assert named(records)["target"] is records and named({"m": records})["m"] is records


def test_paths_of_several_targets_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b c.jsonl"):
        (tmp_path / name).write_text("{}")
    own = LLMReweight(target="m='b c.jsonl' a.jsonl", test=("m=a.jsonl",), target_weight=("m=2",))
    whole = paths.rooted(own)
    assert whole.target == (f"m={tmp_path / 'b c.jsonl'}", f"a={tmp_path / 'a.jsonl'}")
    assert whole.test == (f"m={tmp_path / 'a.jsonl'}",) and paths.rooted(whole) == whole


def test_weights_are_equal_or_what_is_said_and_add_up_to_one(folder):
    assert made(folder).target_weights == WEIGHTS
    assert made(folder, target_weight=()).target_weights == dict.fromkeys(TARGETS, 1 / 3)
    assert made(folder, ("math",)).target_weights == {"math": 1.0}
    same = made(folder, target_weight=("code=0.5", "chat=1.5", "math=2"))
    assert same.target_weights == WEIGHTS and same.fingerprint() == made(folder).fingerprint()
    assert made(folder, target_weight=()).fingerprint() != same.fingerprint()


# Rows of a batch


@given(
    st.lists(st.tuples(st.floats(0.05, 1), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_rows_are_shared_out_for_the_least_variance(pairs, total):
    """Against every way to share them out, with one row each at least and none too many."""
    weights = {str(i): weight for i, (weight, _) in enumerate(pairs)}
    sizes = {str(i): size for i, (_, size) in enumerate(pairs)}
    found = allot(weights, sizes, total)
    assert all(1 <= found[name] <= sizes[name] for name in sizes)
    wanted = max(len(pairs), min(total, sum(sizes.values())))
    assert sum(found.values()) == wanted

    def variance(counts):
        return sum(w**2 / n for w, n in zip(weights.values(), counts, strict=True))

    ways = itertools.product(*(range(1, size + 1) for size in sizes.values()))
    best = min(variance(way) for way in ways if sum(way) == wanted)
    assert variance(found.values()) == pytest.approx(best, rel=1e-12)


def plain_rows(name, count):
    ids, trained = ((1, 2),) * count, ((False, True),) * count
    return Rows(name=name, ids=ids, trained=trained, records=tuple(range(count)))


@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(1, 6)), min_size=1, max_size=3))
def test_batches_are_right_on_average_for_any_weights(pairs):
    """Over whole epochs of all targets, the mean of the batches is sum_t w_t mean_t to rounding."""
    total = sum(weight for weight, _ in pairs)
    own = [
        targets.Target(name=n, weight=w / total, rows=plain_rows(n, size), test=plain_rows(n, 1))
        for n, (w, size) in zip("abc", pairs, strict=False)
    ]
    losses = {t.name: [math.sin(7 * i + ord(t.name)) for i in range(len(t.rows))] for t in own}
    counts = targets.shared_out(own, 4)
    steps = math.lcm(*(len(t.rows) for t in own))
    found = 0.0
    stream = targets.stream(own, rows=4, seed=3)
    for _ in range(steps):
        batch = next(stream)
        assert [label[0] for label in batch.labels] == [
            t.name for t, n in zip(own, counts, strict=True) for _ in range(n)
        ]
        rows = [losses[n][int(i)] for n, _, i in (b.partition(":") for b in batch.labels)]
        found += float(batch.share @ torch.tensor(rows, dtype=torch.float64)) / steps
        assert float(batch.share.sum()) == pytest.approx(1, abs=1e-15)
    wanted = sum(t.weight * sum(losses[t.name]) / len(t.rows) for t in own)
    assert found == pytest.approx(wanted, abs=1e-13)


def test_one_target_is_drawn_and_weighed_as_ever(folder):
    """The batches, shares and losses of a target alone, bit for bit; nothing new in a record."""
    plain = {"target": str(folder / "math.jsonl"), "test": str(folder / "math-test.jsonl")}
    task = made(folder, ("math",), **plain)
    generator = torch.Generator().manual_seed(5)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(5)))
    upper, _ = task.batches(generator)
    before = Stratified([task.targets[0].rows], rows=[8], seed=seed)
    model = tiny_model(len(task.tokenizer), layers=1, width=16, seed=0)
    assert task.targets[0].rows.name == "target" and task.targets[0].test.name == "test"
    for _ in range(9):
        batch, own = next(upper), next(before)
        assert batch.labels == own.labels and torch.equal(batch.share, torch.full((8,), 1.0) / 8)
        with torch.no_grad():
            wanted = ((1.0 / 8) * task.losses(model, own).double()).sum()
            assert torch.equal(task.upper(torch.zeros(3), model, batch), wanted)
    assert task.metrics(torch.zeros(3), model).keys() == {"weights", "losses"}
    assert not {"targets", "target_weight"} & task.fingerprint().keys()
    assert {"file of target", "file of test"} <= task.fingerprint().keys()
    assert list(task.fingerprint())[-1] == "file of test"
    (last,) = task.prepare()[-1:]
    assert (
        last == f"target: {len(task.targets[0].rows)} rows; test: {len(task.targets[0].test)} rows"
    )


# Gradients


class Quadratic(LLMReweight):
    """The problem with l_i(y) = a_i |y - c_i|^2 / 2 in the place of a model's loss, in float64."""

    def init(self, generator):
        return torch.tensor([0.3, -0.2, 0.1]).double(), Point()

    def losses(self, model, batch):
        centers, bends = row_numbers(batch)
        return 0.5 * bends * (model.y - centers).square().sum(1)


class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.y = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))


def row_numbers(batch):
    kept, ids = batch.trained.double(), batch.ids.double()
    size = kept.sum(1)
    centers = torch.stack([(ids * kept).sum(1) / size / 100, (ids.square() * kept).sum(1) / 1e5], 1)
    return centers, 1 + size % 3


def closed_form(task):
    """dF/dx = -sum_t w_t p_s (grad l_s)' H^-1 (grad f_t), with y* = H^-1 sum_s p_s mean a c."""
    upper, lower = task.whole()
    x = task.init(None)[0]
    p = x.softmax(0)
    centers, bends = row_numbers(lower)
    means = [bends[lower.source == s].mean() for s in range(3)]
    pulls = [(bends[:, None] * centers)[lower.source == s].mean(0) for s in range(3)]
    h = sum(p[s] * means[s] for s in range(3))
    y = sum(p[s] * pulls[s] for s in range(3)) / h
    slopes = torch.stack([means[s] * y - pulls[s] for s in range(3)])
    centers, bends = row_numbers(upper)
    found = torch.zeros(3, dtype=torch.float64)
    for t, weight in enumerate(task.target_weights.values()):
        rows = upper.source == t
        f = (bends[rows, None] * (y - centers[rows])).mean(0)
        d = -slopes @ f / h
        found += weight * p * (d - p @ d)
    return found


def test_the_gradient_is_the_weighted_sum_of_those_of_each_alone(folder):
    """To 1e-10 in float64, where every row of every target is in the batch, and by closed form."""
    whole = {"kind": Quadratic, "target_batch": 1000}
    together = made(folder, **whole)
    (got,) = hypergradient(together).value
    alone = {name: hypergradient(made(folder, (name,), **whole)).value[0] for name in TARGETS}
    wanted = sum(weight * alone[name] for name, weight in WEIGHTS.items())
    assert float(wanted.norm()) > 1e-4
    assert torch.linalg.norm(got - wanted) <= 1e-10 * wanted.norm()
    assert torch.linalg.norm(got - closed_form(together)) <= 1e-10 * wanted.norm()
    even = sum(alone.values()) / 3
    assert torch.linalg.norm(got - even) > 1e-3 * wanted.norm()  # the weights tell


@pytest.fixture(scope="module")
def real(folder):
    task = made(folder)
    model = tiny_model(len(task.tokenizer), layers=1, width=16, seed=1)
    return task, model, next(task.batches(torch.Generator().manual_seed(0))[0])


def upper_gradient(task, model, parts):
    for p in model.parameters():
        p.grad = None
    loss = sum(task.upper(torch.zeros(3), model, part) for part in parts)
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def test_the_loss_of_a_model_is_the_weighted_sum_of_means(real):
    task, model, batch = real
    with torch.no_grad():
        losses = example_losses(model, batch).double()
        got = task.upper(torch.zeros(3), model, batch)
    means = [losses[batch.source == t].mean() for t in range(3)]
    wanted = sum(w * m for w, m in zip(WEIGHTS.values(), means, strict=True))
    assert float(got) == pytest.approx(float(wanted), rel=1e-12)
    told = task.metrics(torch.zeros(3), model)["targets"]
    assert told == pytest.approx(dict(zip(WEIGHTS, map(float, means), strict=True)), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_it_depends_neither_on_micro_batches_nor_on_padding_nor_on_processes(real, rows):
    task, model, batch = real
    whole = upper_gradient(task, model, [batch])
    task.metrics(torch.zeros(3), model)
    cut = replace(task, micro_batch=rows)
    longer = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, 7)) for name in ("ids", "trained")
    }
    shares = [cut.share(batch, i, 4) for i in range(4)]
    for parts in (
        cut.split(batch),
        cut.split(replace(batch, **longer)),
        [part for share in shares for part in cut.split(share)],
    ):
        got = upper_gradient(task, model, parts)
        # losses are float32, their sums over rows in another order: 1e-6 of the gradient
        assert torch.linalg.norm(got - whole) <= 1e-6 * whole.norm()


def test_a_small_target_counts_as_much_as_its_weight(folder):
    """code has 8 records of 76: copying math tenfold over changes no batch of code's share."""
    task = made(folder, target_weight=())
    batch = next(task.batches(torch.Generator().manual_seed(0))[0])
    sums = [float(batch.share[batch.source == t].sum()) for t in range(3)]
    assert sums == pytest.approx([1 / 3] * 3, abs=1e-15)


def test_searches_of_other_methods_see_the_same_target(folder):
    task = made(folder)
    lab = Lab(problem=task, budget=1e6)
    model = tiny_model(len(task.tokenizer), layers=1, width=16, seed=1)
    got = lab.target_gradient(model, 1000)
    parts = [lab.gradient(model, target.rows, 1000) for target in task.targets]
    for g, *own in zip(got, *parts, strict=True):
        wanted = sum(w * one for w, one in zip(WEIGHTS.values(), own, strict=True))
        assert torch.allclose(g, wanted, atol=1e-6)
    shares = torch.cat([batch.share for batch in lab.target(11)])
    assert len(shares) == 11 and float(shares.sum()) == pytest.approx(1)
    drawn = targets.shared_out(task.targets, 8)
    tokens = [
        n * sum(map(len, t.rows.ids)) / len(t.rows)
        for n, t in zip(drawn, task.targets, strict=True)
    ]
    assert search_tokens(task, {"upper_grad": 3}) == pytest.approx(3 * sum(tokens))


# Runs


def test_a_run_resumes_bit_for_bit(folder, tmp_path):
    solver = scalebio(warmup=1)
    whole = bilevel.solve(made(folder), solver, steps=7)
    for steps in (3, 7):
        parts = bilevel.solve(
            made(folder), solver, steps=steps, checkpoints=tmp_path / "c", resume=True
        )
    assert parts.history == whole.history and torch.equal(parts.x, whole.x)
    for row in whole.history:
        weighted = sum(WEIGHTS[name] * loss for name, loss in row["targets"].items())
        assert row["upper"] == pytest.approx(weighted, rel=1e-9)
    assert "(math " in made(folder).headline(whole.history[-1])


def test_the_order_of_targets_changes_nothing_but_rounding(folder):
    """With equal weights, where who gets the rows that are left over is a tie."""
    results = [
        bilevel.solve(made(folder, names, target_weight=()), scalebio(warmup=1), steps=4)
        for names in (("math", "code", "chat"), ("chat", "math", "code"))
    ]
    a, b = (result.history[-1] for result in results)
    assert a["targets"] == pytest.approx(b["targets"], abs=1e-6)
    assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)


def test_weights_follow_the_target_that_counts(folder):
    """sea is like math, law is like code."""
    ends = []
    for heavy in ("math", "code"):
        task = made(folder, ("math", "code"), target_weight=(f"{heavy}=20",))
        ends.append(bilevel.solve(task, scalebio(warmup=5, upper_lr=0.05), steps=40).history[-1])
    sea = [end["weights"]["sea"] - end["weights"]["law"] for end in ends]
    assert sea[0] > 0.1 and sea[1] < -0.1


def test_the_plan_has_a_row_for_each_target(folder):
    task = made(folder)
    found = survey(task)
    for counted, target in zip(found.targets, task.targets, strict=True):
        assert (counted.name, counted.rows) == (target.name, len(target.rows))
    cells = table(found, task, 100)[3:]
    assert [row["source"] for row in cells] == [
        f"{n} (target, {w:.3g})" for n, w in WEIGHTS.items()
    ]
    drawn = targets.shared_out(task.targets, 8)
    epochs = [100 * n / len(t.rows) for n, t in zip(drawn, task.targets, strict=True)]
    assert [row["epochs"] for row in cells] == pytest.approx(epochs)


def test_records_in_memory_have_names_too(folder):
    def records(letters):
        return [{"text": f"{letters} {i}"} for i in range(9)]

    task = bilevel.problems.llm_reweight.from_records(
        {"a": records("ab"), "b": records("cd")},
        {"m": records("ef"), "n": records("gh")},
        target_weight=("m=3",),
    )
    assert [(t.name, t.weight, len(t.rows), len(t.test)) for t in task.targets] == [
        ("m", 0.75, 7, 2),
        ("n", 0.25, 7, 2),
    ]
    assert task.data.tests["m"].name == "test of m"
    assert {field.name for field in fields(task)} >= {"target", "target_weight", "test"}
    assert any("every fourth target record of m, n" in note for note in task.data.notes)


# Faults


WRONG = {
    "target_weight=mth=2": ["problem.target_weight: nothing is called 'mth'; did you mean 'math'?"],
    "target_weight=math=0": ["must be positive and finite, got math=0; leave out a target"],
    "target_weight='math=-1 code=nan chat=inf'": ["got math=-1, code=nan, chat=inf"],
    "target_weight=2": ["problem.target_weight must be name=number, got a bare number"],
    "target_weight=math=x": ["must be name=number or a number, got 'math=x'"],
    "target_weight='math=1 math=2'": ["problem.target_weight is given twice for math"],
    "target_weight='mth=2 chat=0'": ["nothing is called 'mth'", "got chat=0"],
    "target={math}": [
        "shares out the upper loss among several targets, but there is one, 'target'; leave it out."
    ],
    "target_batch=2": ["problem.target_batch must be at least the number of targets, 3, got 2"],
    "test={math}": [
        "problem.test is one set for 3 targets; name the target of each, as 'math=path'"
    ],
    "test=mth={math}": ["problem.test: no target is called 'mth'; did you mean 'math'?"],
    "target='sea={math} b={chat}'": ["a source may not be called 'sea'"],
    "target='a={math} b={math}'": ["target: found the same file twice"],
    "target='math={math} code={empty} chat={gone}' target_weight=math=0": [
        "empty.jsonl: found an empty file",
        "gone.jsonl",
        "got math=0",
    ],
    "target='math={math} code={three} chat={two}' test=": [
        "three.jsonl: expected at least 4 target records",
        "two.jsonl: expected at least 4 target records",
    ],
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_is_told_together(folder, tmp_path, capsys, words):
    import shlex

    from bilevel.run import main

    files = {name: str(folder / f"{name}.jsonl") for name in TARGETS}
    for name, count in (("empty", 0), ("two", 2), ("three", 3)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        rows = (json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    files["gone"] = "gone.jsonl"
    both = " ".join(f"{name}={files[name]}" for name in TARGETS)
    options = {"problem": "llm_reweight", "out": str(tmp_path / "out"), "width": "16"}
    options |= {"sources": " ".join(f"{n}={folder / n}.jsonl" for n in LETTERS), "target": both}
    options |= {"target_weight": "math=2", "verdict": "false"}
    given_ = (word.partition("=") for word in shlex.split(words.format(**files)))
    options |= {key: value for key, _, value in given_}
    assert main([f"{key}={value}" for key, value in options.items()]) == 2
    said = capsys.readouterr().err
    for told in WRONG[words]:
        assert said.count(told) == 1, said
    assert not (tmp_path / "out").exists()


def test_a_duplicate_name_is_an_error_of_the_option():
    with pytest.raises(InputError, match="target: found the name 'a' for several files"):
        named(("a=x.jsonl", "a=y.jsonl"))
