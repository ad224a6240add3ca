"""What every baseline does: finds the right source within its budget, and tells what is wrong."""

import json

import pytest
from baselines_case import BUDGET, small_problem

from bilevel import InputError
from bilevel.problems.llm_reweight.baselines import METHODS, Lab, find
from bilevel.problems.llm_reweight.baselines.lab import search_tokens


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return small_problem(tmp_path_factory.mktemp("baselines"))


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
