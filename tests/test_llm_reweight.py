"""The data-weighting problem on a real tiny Llama against closed forms and invariances."""

import copy
import dataclasses
import json
import random

import pytest
import torch

import bilevel
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.llm_reweight.model import example_losses, tiny_model
from bilevel.problems.llm_reweight.tokens import Rows, Stratified, cut, tokenize
from bilevel.run import main
from bilevel.solvers.penalty import scalebio, scalebio_votes

WORDS = {
    "sea": ["wave", "tide", "salt", "ship", "sail", "harbor", "storm", "anchor", "deck", "gull"],
    "law": [
        "court",
        "judge",
        "claim",
        "appeal",
        "statute",
        "clause",
        "brief",
        "counsel",
        "ruling",
        "bench",
    ],
    "food": [
        "bread",
        "oil",
        "flour",
        "oven",
        "basil",
        "onion",
        "pepper",
        "broth",
        "spoon",
        "plate",
    ],
}


def write_sources(folder, records=60):
    draw = random.Random(0)
    for name, words in WORDS.items():
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(records)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS["sea"], k=30))}) for _ in range(40)]
    (folder / "target.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_sources(path)
    return path


def problem(folder, names=("sea", "law", "food"), **options):
    options = {"max_length": 24, "batch": 6, "target_batch": 3, "width": 32} | options
    return LLMReweight(
        sources=tuple(f"{n}={folder / n}.jsonl" for n in names),
        target=str(folder / "target.jsonl"),
        verdict=False,
        **options,
    )


def weight_gradient(task, y, z, batch, x, penalty):
    """What the x gathers from the two sweeps, through the solver's own machinery."""
    variable = bilevel.Variable("x", x.clone(), bilevel.optimizer_by_name("sgd", 1.0))
    for model, share in ((y, penalty), (z, -penalty)):
        with variable.weighted(share):
            for part in task.split(batch):
                task.lower(variable.value, model, part).backward()
    return variable.gradient()[0]


@pytest.fixture(scope="module")
def setup(folder):
    task = problem(folder)
    task.prepare()
    y, z = (tiny_model(len(task.tokenizer), layers=2, width=32, seed=s) for s in (1, 2))
    batch = next(Stratified(task.rows, rows=[4, 4, 4], seed=0))
    x = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    return task, y, z, batch, x


def test_weight_gradient_equals_the_closed_form(setup):
    """dF_s = alpha p_s (d_s - sum_t p_t d_t), d_s = l_s(y) - l_s(z), to 1e-5 relative."""
    task, y, z, batch, x = setup
    with torch.no_grad():
        gaps = example_losses(y, batch).double() - example_losses(z, batch).double()
    d = torch.stack([gaps[batch.source == s].mean() for s in range(3)])
    p = x.softmax(0)
    expected = 100.0 * p * (d - p @ d)
    got = weight_gradient(task, y, z, batch, x, 100.0)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert not torch.any(weight_gradient(task, y, y, batch, x, 100.0))


@pytest.mark.parametrize("rows", [12, 8, 4, 1])
def test_weight_gradient_does_not_depend_on_micro_batches_or_padding(setup, rows):
    task, y, z, batch, x = setup
    whole = weight_gradient(task, y, z, batch, x, 1.0)
    parts = dataclasses.replace(task, micro_batch=rows)
    padded = dataclasses.replace(
        batch,
        ids=torch.nn.functional.pad(batch.ids, (0, 9)),
        trained=torch.nn.functional.pad(batch.trained, (0, 9)),
    )
    for other in (weight_gradient(parts, y, z, batch, x, 1.0),):
        assert torch.allclose(other, whole, rtol=0, atol=1e-6)
    assert torch.allclose(weight_gradient(task, y, z, padded, x, 1.0), whole, rtol=0, atol=1e-6)
    assert sum(len(part.ids) for part in cut(batch, rows)) == len(batch.ids)


@pytest.mark.parametrize("rows", [0, 4])
def test_a_step_of_the_solver_moves_the_weights_by_the_closed_form(folder, rows):
    """Plain descent: x_6 - x_5 = - lr alpha p_s (d_s - sum_t p_t d_t) on the batch of that step."""
    task, seen = problem(folder, batch=12, micro_batch=rows), {}

    def keep(state, record):
        if state.step == 5:
            seen.update({n: copy.deepcopy(state.variables[n].value) for n in "xyz"})
            seen["batch"] = next(copy.copy(state.streams["lower"]))

    solver = scalebio(warmup=3, upper_optimizer="sgd", upper_lr=0.5, penalty=7.0, lower_lr=0.01)
    moved = bilevel.solve(task, solver, steps=6, callbacks=[keep]).x - seen["x"].detach()
    x, y, z, batch = (seen[n] for n in ("x", "y", "z", "batch"))
    with torch.no_grad():
        gaps = example_losses(y, batch).double() - example_losses(z, batch).double()
        d = torch.stack([gaps[batch.source == s].mean() for s in range(3)])
        p = x.softmax(0)
        expected = -0.5 * 7.0 * p * (d - p @ d)
    assert torch.linalg.norm(expected) > 1e-6
    assert torch.linalg.norm(moved - expected) <= 1e-5 * torch.linalg.norm(expected)


class Silent(LLMReweight):
    """A target that pulls nowhere, so that y = z at every step."""

    def upper(self, x, y, batch):
        return 0.0 * LLMReweight.upper(self, x, y, batch)


@pytest.mark.parametrize("solver", [scalebio, scalebio_votes])
def test_weights_do_not_move_while_the_copies_are_equal(folder, solver):
    given = problem(folder)
    options = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    result = bilevel.solve(Silent(**options), solver(warmup=0), steps=12)
    assert torch.equal(result.x, torch.zeros(3, dtype=torch.float64))


def test_weights_do_not_depend_on_the_order_of_sources(folder):
    results = []
    for names in (("sea", "law", "food"), ("food", "sea", "law")):
        result = bilevel.solve(problem(folder, names), scalebio(warmup=1), steps=4)
        results.append(result.history[-1]["weights"])
    assert results[0].keys() == results[1].keys()
    assert all(abs(results[0][n] - results[1][n]) < 1e-6 for n in WORDS)


def test_duplicated_records_do_not_change_a_weight(folder, tmp_path):
    write_sources(tmp_path)
    (tmp_path / "law.jsonl").write_text("\n".join([(folder / "law.jsonl").read_text()] * 10))
    learned = []
    for place in (folder, tmp_path):
        task = problem(place)
        result = bilevel.solve(task, scalebio(warmup=5), steps=60)
        learned.append(result.history[-1]["weights"])
    assert learned[0] == learned[1]
    assert "540 duplicates left out" in "\n".join(task.prepare())


def test_the_right_source_wins(folder):
    result = bilevel.solve(problem(folder), scalebio(warmup=5, upper_lr=0.05), steps=80)
    weights = result.history[-1]["weights"]
    assert weights["sea"] > 0.6 > 2 * max(weights["law"], weights["food"])
    assert result.counts == {"upper_grad": 80, "lower_grad": 160, "sweeps": 160}


def test_batches_are_stratified_and_visit_every_row_once_an_epoch():
    rows = [
        Rows(name=n, ids=((1, 2),) * k, trained=((False, True),) * k, records=tuple(range(k)))
        for n, k in (("a", 6), ("b", 4))
    ]
    stream = Stratified(rows, rows=[2, 2], seed=3)
    labels = [next(stream).labels for _ in range(6)]
    assert all([label[0] for label in row] == ["a", "a", "b", "b"] for row in labels)
    first = [label for row in labels[:3] for label in row if label[0] == "a"]
    assert sorted(first) == [f"a:{i}" for i in range(6)]
    other = Stratified(rows, rows=[2, 2], seed=3)
    other.load_state_dict({"position": 4})
    assert next(other).labels == labels[4]


def test_overlap_is_counted_and_goes_on_only_when_told(folder, tmp_path, capsys):
    target = folder / "sea.jsonl"
    assert run(folder, tmp_path / "a", f"problem.target={target}") == 2
    said = capsys.readouterr().err
    assert f"{target} shares 60 records with {target} (counting from 0, 0 is 0 there, " in said
    assert said.count("shares") == 1  # not once more for the part held out
    assert "problem.allow_overlap=true" in said
    more = ["problem.allow_overlap=true", "verdict=false"]
    assert run(folder, tmp_path / "a", f"problem.target={target}", *more) == 0
    assert f"warning: {target} shares 60 records" in capsys.readouterr().out
    assert "shares 60 records" in (tmp_path / "a" / "report.html").read_text()


def test_sources_that_share_records_are_named(folder, tmp_path, capsys):
    """Which of two copies gets the weight says nothing; half of the smaller one is much."""
    lines = (folder / "sea.jsonl").read_text().splitlines(keepends=True)
    law = (folder / "law.jsonl").read_text().splitlines(keepends=True)
    files = {"half": lines[:20] + law[:20], "third": lines[:20] + law[:21], "copy": lines}
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(text))
    sources = f"{folder / 'sea.jsonl'} " + " ".join(str(tmp_path / f"{n}.jsonl") for n in files)
    words = "problem.batch=8", "verdict=false", f"problem.sources={sources}"
    assert run(folder, tmp_path / "a", *words) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "share" in line[:60]]
    pairs = {tuple(line.split()[i] for i in (2, 4, 6)) for line in told if line[:7] == "warning"}
    expected = {("sea", "copy", "60"), ("sea", "half", "20"), ("half", "copy", "20")}
    assert pairs == expected | {("half", "third", "40")}


def test_of_repeated_records_one_row_is_left_and_said(folder, tmp_path, capsys):
    (tmp_path / "again.jsonl").write_text('{"text": "a gull"}\n' * 40)
    sources = f"{folder / 'sea.jsonl'} {tmp_path / 'again.jsonl'}"
    assert run(folder, tmp_path / "a", f"problem.sources={sources}") == 2
    assert "source again has 1 row (39 duplicates left out)" in capsys.readouterr().err


def test_a_test_set_that_overlaps_is_refused_too(folder, tmp_path, capsys):
    first = (folder / "law.jsonl").read_text().splitlines()[1]
    (tmp_path / "test.jsonl").write_text(first + '\n{"text": "another one"}\n')
    assert run(folder, tmp_path / "a", f"problem.test={tmp_path / 'test.jsonl'}") == 2
    words = (
        f"test.jsonl shares 1 record with {folder / 'law.jsonl'} (counting from 0, 0 is 1 there)"
    )
    assert words in capsys.readouterr().err


def test_every_record_without_a_trained_token_is_told(folder, tmp_path, capsys):
    """Conversations that end with a question longer than a row: the answer is cut away."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "wave tide " * 40)]
    record = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
    copies = [record.replace('"a"', f'"{i}"') for i in range(7)]
    (tmp_path / "law.jsonl").write_text("\n".join(copies))
    (tmp_path / "food.jsonl").write_text(f"[{record}]")
    sources = f"{folder / 'sea.jsonl'} {tmp_path / 'law.jsonl'} {tmp_path / 'food.jsonl'}"
    assert run(folder, tmp_path / "a", f"problem.sources={sources}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert "law.jsonl:1: found no token left to train on" in lines[0]
    assert "raise problem.max_length=24" in lines[0]
    assert "law.jsonl: and 2 more." in lines[5]
    assert "food.jsonl: record 0 (counting from 0): found no token left" in lines[6]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["target", "test"])
def test_a_target_or_test_of_one_row_is_refused_by_name(folder, tmp_path, capsys, part):
    (tmp_path / "one.jsonl").write_text('{"text": "a single one"}')
    more = {"problem.test": folder / "target.jsonl", f"problem.{part}": tmp_path / "one.jsonl"}
    assert run(folder, tmp_path / "a", *(f"{k}={v}" for k, v in more.items())) == 2
    assert f"{part} has 1 row, expected at least 2" in capsys.readouterr().err


def test_a_search_that_fails_at_its_first_step_says_why(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "a", "solver=maid") == 1  # the lower loss is not convex
    assert "failed: " in (told := capsys.readouterr().err) and "Last finite checkpoint" in told
    assert not (tmp_path / "a" / "weights.json").exists()


class Bytes:
    """A tokenizer of one token a byte."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [list(t.encode()) for t in texts]}


def test_long_prompts_are_cut_so_that_the_answer_survives(tmp_path):
    from bilevel.problems.llm_reweight.records import read_source

    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "p" * 50, "completion": "answer"}))
    rows = tokenize(read_source("a", file), Bytes(), max_length=16)
    assert bytes(rows.ids[0][:-1]).decode() == "p" * 9 + "answer"
    assert rows.truncated == 1
    assert rows.trained_tokens == 7  # six bytes and the end


def run(folder, out, *more):
    sources = " ".join(f"{folder / n}.jsonl" for n in WORDS)
    options = ["problem.max_length=24", "problem.batch=6", "problem.width=32", "steps=24"]
    options += [f"problem.sources={sources}", f"problem.target={folder / 'target.jsonl'}"]
    options += ["problem=llm_reweight", "problem.verdict_steps=12", f"out={out}", *more]
    given = dict(option.split("=", 1) for option in options)  # the last of a key wins
    return main([f"{key}={value}" for key, value in given.items()])


def test_a_run_leaves_everything_behind(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "a", "memory=lisa", "memory.gamma=1") == 0
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names >= {"weights.json", "weights.csv", "weights.yaml", "report.html", "plots"}
    body = json.loads((tmp_path / "a" / "weights.json").read_text())
    assert body["schema"] == "bilevel.llm_reweight/1"
    assert abs(sum(s["weight"] for s in body["sources"]) - 1) < 1e-9
    keys = {"name", "path", "records", "trained_tokens", "weight", "share_examples"}
    assert keys <= body["sources"][0].keys()
    assert "LISA trains blocks" in (tmp_path / "a" / "log.txt").read_text()
    said = capsys.readouterr().out
    assert "verdict: training 3 fresh models, 12 steps each" in said  # all mixtures are uniform
    assert "paired seeds" in said


def test_markup_in_a_name_is_escaped(folder, tmp_path):
    sources = f"'<b>x={folder / 'sea.jsonl'}' law={folder / 'law.jsonl'}"
    assert run(folder, tmp_path / "a", f"problem.sources={sources}", "verdict=false") == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("problem.sources=one.jsonl", "at least two sources"),
        ("problem.target=", "problem.target is not"),
        ("problem.batch=2", "at least the number of sources"),
        ("problem.batch=900", "lower problem.batch"),
        ("problem.model=no/such/folder", "no such folder"),
        ("problem.target={sea}", "shares 60 records"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(folder, tmp_path, capsys, option, words):
    option = option.format(sea=folder / "sea.jsonl")
    assert run(folder, tmp_path / "a", option) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_weights_that_hardly_moved_are_called_so(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "a", "steps=2") == 0
    words = "within a tenth of uniform after 2 steps"
    assert words in capsys.readouterr().out
    assert any(
        words in note for note in json.loads((tmp_path / "a/weights.json").read_text())["notes"]
    )
