"""One weight for each example: batches, gradients, files and resume against plain restatements."""

import dataclasses
import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

import bilevel
from bilevel import checkpoint
from bilevel.problems.llm_reweight import LLMReweight, example_weights
from bilevel.problems.llm_reweight.model import tiny_model
from bilevel.problems.llm_reweight.per_example import Pooled, weights_of
from bilevel.run import main
from bilevel.solvers.penalty import scalebio


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources and a target; some records are longer than a row, one comes twice."""
    place = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def lines(letters, lengths):
        rows = [[" ".join("".join(draw.choices(letters, k=4)) for _ in range(n))] for n in lengths]
        return [json.dumps({"text": row[0]}) + "\n" for row in rows]

    sea = lines("abcde", [6, 40, 6, 6, 80, 6, 6, 6])
    (place / "sea.jsonl").write_text("".join([*sea, sea[0]]))
    (place / "law.jsonl").write_text("".join(lines("fghij", [6] * 5)))
    (place / "target.jsonl").write_text("".join(lines("abcde", [8] * 20)))
    return place


def made(folder, names=("sea", "law"), **options):
    return LLMReweight(
        sources=tuple(f"{n}={folder / n}.jsonl" for n in names),
        target=str(folder / "target.jsonl"),
        weigh="examples",
        **{"max_length": 32, "batch": 6, "target_batch": 4, "width": 16, "verdict": False}
        | options,
    )


def test_records_are_numbered_through_all_sources(folder):
    task = made(folder)
    found = task.members
    assert len(found) == 8 + 5  # the copy is left out
    assert found.source.tolist() == [0] * 8 + [1] * 5
    assert found.index.tolist() == [*range(8), *range(5)]
    cuts = [
        Counter(rows.records)[i]
        for rows, n in zip(task.rows, (8, 5), strict=True)
        for i in range(n)
    ]
    assert found.rows.tolist() == cuts and max(cuts) > 1
    x = task.init(torch.Generator().manual_seed(0))[0]
    assert torch.equal(x, torch.zeros(13).double())
    weights = found.weights(x)
    assert weights.tolist() == pytest.approx([c / sum(cuts) for c in cuts])


def test_a_batch_draws_every_row_once_an_epoch_and_counts_them(folder):
    task = made(folder)
    stream = Pooled(task.rows, task.members, rows=6, seed=3)
    total = sum(len(rows) for rows in task.rows)
    drawn: Counter[int] = Counter()
    for step in range(1, 2 * total + 1):  # twelve epochs
        batch = next(stream)
        assert torch.equal(batch.pool, batch.source) and len(batch.ids) == 6
        names = [label.split(":")[0] for label in batch.labels]
        expected = [("sea", "law")[k] for k in task.members.source[batch.source]]
        assert names == expected
        drawn.update(batch.source.tolist())
        assert stream.seen(step).tolist() == [drawn[i] for i in range(13)]
    assert [drawn[i] for i in range(13)] == (12 * task.members.rows).long().tolist()
    again = Pooled(task.rows, task.members, rows=6, seed=3)
    again.load_state_dict({"position": 7})
    third = Pooled(task.rows, task.members, rows=6, seed=3)
    assert next(again).labels == [next(third).labels for _ in range(8)][-1]


@pytest.fixture(scope="module")
def setup(folder):
    task = made(folder)
    y, z = (tiny_model(len(task.tokenizer), layers=1, width=16, seed=s) for s in (1, 2))
    batch = next(Pooled(task.rows, task.members, rows=12, seed=0))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(13, dtype=torch.float64, generator=generator)
    return task, y, z, batch, x


def gap_gradient(task, x, y, z, parts):
    x = x.clone().requires_grad_()
    for part in parts:
        (task.lower(x, y, part) - task.lower(x, z, part)).backward()
    return x.grad


def test_the_gradient_is_that_of_the_softmax_over_the_batch(setup):
    """G_i = sum over rows r of i of p_r (d_r - sum_q p_q d_q), and 0 for what was not drawn."""
    task, y, z, batch, x = setup
    with torch.no_grad():
        d = task.losses(y, batch).double() - task.losses(z, batch).double()
    e = x[batch.source].exp()
    p = e / e.sum()
    expected = torch.zeros(13).double().index_add(0, batch.source, p * (d - p @ d))
    got = gap_gradient(task, x, y, z, [batch])
    assert torch.allclose(got, expected, atol=1e-7)
    unseen = sorted(set(range(13)) - set(batch.source.tolist()))
    assert unseen and not got[unseen].any()


@pytest.mark.parametrize("rows", [5, 1])
def test_parts_and_shares_add_up_to_the_batch(setup, rows):
    task, y, z, batch, x = setup
    whole = gap_gradient(task, x, y, z, [batch])
    parts = dataclasses.replace(task, micro_batch=rows).split(batch)
    assert len(parts) > 1
    assert torch.allclose(gap_gradient(task, x, y, z, parts), whole, atol=1e-6)
    shares = [task.share(batch, i, 3) for i in range(3)]
    assert torch.allclose(gap_gradient(task, x, y, z, shares), whole, atol=1e-6)
    assert sum(float(weights_of(x, part).sum()) for part in shares) == pytest.approx(1)


def test_the_record_of_a_step_stays_small(setup):
    task, y, _, _, x = setup
    record = task.metrics(x, y)
    assert sum(record["weights"].values()) == pytest.approx(1)
    assert len(json.dumps(record)) < 400
    even = task.metrics(torch.zeros(13).double(), y)["examples"]
    assert even["effective_share"] == pytest.approx(1)
    assert even["least"] == pytest.approx(1) and even["largest"] == pytest.approx(1)
    peak = torch.full((13,), -50.0).double()
    peak[0] = 50.0  # one row has all of the weight
    alone = task.metrics(peak, y)["examples"]["effective_share"]
    assert alone == pytest.approx(1 / float(task.members.rows.sum()))


def test_scrambled_examples_lose_weight_within_a_hundred_steps(tmp_path):
    """Target-like records and gibberish of other letters, mixed in one file."""
    draw = random.Random(1)
    words = ["wave", "tide", "salt", "ship", "sail", "harbor", "storm", "anchor"]

    def line(bad):
        text = " ".join(draw.choices(words, k=12))
        return "".join(draw.sample(text, len(text))) if bad else text

    bad = [i % 3 == 0 for i in range(60)]
    (tmp_path / "mixed.jsonl").write_text(
        "".join(json.dumps({"text": line(b)}) + "\n" for b in bad)
    )
    (tmp_path / "target.jsonl").write_text(
        "".join(json.dumps({"text": line(False)}) + "\n" for _ in range(40))
    )
    task = made(tmp_path, ("mixed",), batch=12, width=32)
    solver = scalebio(warmup=5, **task.solver_wishes() | {"upper_lr": 0.03})
    x = bilevel.solve(task, solver, steps=100).x
    bad = torch.tensor(bad)
    below = (x[bad][:, None] < x[~bad][None]).double().mean()  # AUROC
    assert float(below) >= 0.98


OPTIONS = ["problem=llm_reweight", "weigh=examples", "max_length=32", "batch=6", "target_batch=4"]
OPTIONS += ["width=16", "verdict_steps=4", "verdict_seeds=2", "warmup=1", "checkpoint_every=3"]


def command(folder, out, *more):
    sources = f"sea={folder / 'sea.jsonl'} law={folder / 'law.jsonl'}"
    return [
        *OPTIONS,
        f"sources={sources}",
        f"target={folder / 'target.jsonl'}",
        f"out={out}",
        *more,
    ]


def test_a_run_leaves_a_line_for_each_record(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "a", "steps=8")) == 0
    said = capsys.readouterr().out
    assert "verdict: training 4 fresh models, 4 steps each, on rows drawn by" in said
    assert "13 examples have from" in said
    lines = list(map(json.loads, (tmp_path / "a/example_weights.jsonl").read_text().splitlines()))
    keys = ["source", "index", "id", "sha1", "weight", "multiplier", "score", "seen", "rows"]
    assert all(list(line) == [*keys, "loss"] for line in lines)
    body = json.loads((tmp_path / "a/weights.json").read_text())
    for source in body["sources"]:
        records = (folder / f"{source['name']}.jsonl").read_text().splitlines()
        own = [line for line in lines if line["source"] == source["name"]]
        assert [line["index"] for line in own] == list(range(len(set(records))))
        for line in own:
            text = json.loads(records[line["index"]])["text"]
            assert line["sha1"] == hashlib.sha1(text.encode()).hexdigest()
    array = np.load(tmp_path / "a/example_weights.npy", allow_pickle=False)
    assert array.tolist() == [line["weight"] for line in lines]
    assert sum(array) == pytest.approx(1)
    assert sum(line["seen"] for line in lines) == 8 * 6
    total = sum(line["rows"] for line in lines)
    for line in lines:  # the draws of a record's rows, to those under even weights
        assert line["multiplier"] == pytest.approx(line["weight"] * total / line["rows"])
    assert max(abs(line["score"]) for line in lines) > 0
    config = (tmp_path / "a/config.yaml").read_text()
    assert "upper_optimizer: adam" in config and "upper_lr: 0.01" in config


def test_plain_losses_are_the_means_of_the_rows(setup):
    task, y, *_ = setup
    found = example_weights.plain_losses(task, y)
    from bilevel.problems.llm_reweight.tokens import collate

    for k, name in enumerate(task.names):
        rows = task.rows[k]
        for i in (0, 4):
            own = [r for r, record in enumerate(rows.records) if record == i]
            with torch.no_grad():
                each = [task.losses(y, collate([rows], [(0, r)], [1.0])) for r in own]
            place = 8 * k + i
            assert float(found[place]) == pytest.approx(float(torch.cat(each).mean()), abs=1e-6)
        assert task.names[k] == name


def test_rows_are_drawn_by_the_weights_of_their_records(folder):
    task = made(folder)
    x = torch.linspace(-1, 1, 13).double()
    share = example_weights._row_weights(task.members, x)
    draws = example_weights._draws(share, count=6, seed=0)
    drawn = Counter(row for _ in range(500) for row in next(draws))
    got = torch.tensor([drawn[i] / 3000 for i in range(len(share))])
    # 125 epochs, in each at most 1/2 of a draw off (one standard deviation): 4 * 5.6 of 3000
    assert torch.allclose(got.double(), share, atol=0.0075)
    for row in range(len(share)):
        assert drawn[row] > 0


def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder, tmp_path):
    assert main(command(folder, tmp_path / "whole", "steps=8", "verdict=false")) == 0
    assert main(command(folder, tmp_path / "cut", "steps=4", "verdict=false")) == 0
    assert main(command(folder, tmp_path / "cut", "steps=8", "verdict=false")) == 0
    for name in ("example_weights.jsonl", "trajectory.jsonl", "weights.csv"):
        texts = [(tmp_path / out / name).read_text() for out in ("whole", "cut")]
        assert texts[0] == texts[1]
    ends = [checkpoint.latest(tmp_path / out / "checkpoints") for out in ("whole", "cut")]
    bytes_ = [(end / "tensors.safetensors").read_bytes() for end in ends]
    assert bytes_[0] == bytes_[1]


def test_one_source_is_enough_for_examples_only(folder, tmp_path, capsys):
    task = made(folder, ("sea",))
    assert task.check() == [] and len(task.members) == 8
    words = [w for w in command(folder, tmp_path / "a") if not w.startswith(("sources", "weigh"))]
    assert main([*words, f"sources={folder / 'sea.jsonl'}"]) == 2
    assert "problem.weigh=examples weighs the examples of one" in capsys.readouterr().err


def test_a_batch_larger_than_all_rows_is_refused(folder):
    with pytest.raises(bilevel.InputError, match="exceeds all rows"):
        made(folder, batch=100).prepare()
