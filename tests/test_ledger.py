"""Losses of the sources that a run notes: those of rows at y, by any micro-batch, for no pass."""

import json

import pytest
import torch

import bilevel
from bilevel import Single
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.llm_reweight.tokens import cut
from bilevel.solvers.penalty import f2sa, scalebio


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    names = {"sea": "wave tide salt", "law": "court judge claim", "<b>": "bread oil flour"}
    for name, words in {**names, "target": "wave tide ship"}.items():
        lines = [json.dumps({"text": f"{words} {i} " * 4}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "sources": tuple(f"{name}={folder / name}.jsonl" for name in names),
        "target": str(folder / "target.jsonl"),
    }


def problem(files, **options):
    return LLMReweight(
        **files, layers=2, width=32, batch=6, max_length=24, verdict=False, **options
    )


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_losses_of_sources_are_those_of_their_rows_at_y(files, micro_batch):
    own = problem(files, micro_batch=micro_batch)
    solver, seen = scalebio(warmup=0), []
    state = solver.init(own, bilevel.Full(), Single(), torch.Generator().manual_seed(0))
    y = state.variables["y"].value
    for _ in range(2):
        batch = next(clone(own, state))
        want = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for row in cut(batch, 1):
                want[row.source] += own.losses(y, row).double() / 2
        own.ledger.take(y, 3)
        state = solver.step(own, Single(), state)
        values = own.metrics(state.variables["x"].value, y)["losses"]
        assert list(values) == ["sea", "law", "<b>"]
        assert list(values.values()) == pytest.approx(want.tolist(), rel=1e-5)
        seen.append(values)
    assert seen[0] != seen[1]
    assert set(own.metrics(state.variables["x"].value, y)["losses"].values()) == {None}


def clone(own, state):
    """The lower stream at its present position, without moving it."""
    _, lower = own.batches(torch.Generator().manual_seed(0))
    lower.load_state_dict(state.streams["lower"].state_dict())
    lower.seed = state.streams["lower"].seed
    return lower


def test_weighted_losses_add_up_to_the_lower_loss(files):
    rows = bilevel.solve(problem(files), f2sa(inner_steps=1, warmup=0), steps=3).history
    before = dict.fromkeys(rows[0]["weights"], 1 / 3)
    for row in rows:  # the losses of a step are at the weights before it
        total = sum(before[name] * loss for name, loss in row["losses"].items())
        assert total == pytest.approx(row["lower"], rel=1e-6)
        before = row["weights"]
