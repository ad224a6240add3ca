"""On a GPU: engines with one process against none, LISA's bytes, and peaks against the plan."""

import importlib
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bilevel import LISA, Always, LoRA, Problem, Single, solve
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.llm_reweight.model import example_losses, tiny_model
from bilevel.problems.llm_reweight.placement import Placement
from bilevel.problems.llm_reweight.tokens import Batch
from bilevel.run import main
from bilevel.solvers.penalty import scalebio
from bilevel.tree import leaves, whole

DEVICE = "cuda"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch finds none"),
]


class Random(Problem):
    """Two sources of random tokens, one of them the target, and a tiny Llama on the device."""

    def __init__(self, dtype=torch.float32):
        self.placement = Placement(device=DEVICE, dtype=dtype)

    def init(self, generator):
        model = tiny_model(96, layers=4, width=64, seed=0, placement=self.placement)
        return torch.zeros(2, dtype=torch.float64), model

    def batches(self, generator):
        ids = torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(1))
        return Always(rows(ids[:4], 1)), Always(rows(ids, 2))

    def upper(self, x, y, batch):
        return (batch.share * example_losses(y, batch).double().cpu()).sum()

    def lower(self, x, y, batch):
        weights = x.softmax(0)[batch.source] * batch.share
        return (weights * example_losses(y, batch).double().cpu()).sum()

    def split(self, batch):
        halves = zip(*(t.chunk(2) for t in (batch.ids, batch.source, batch.share)), strict=True)
        return [rows(ids, 0, source, share) for ids, source, share in halves]


def rows(ids, sources, source=None, share=None):
    """Rows of one length; the first half is of the first source."""
    count = len(ids)
    if source is None:
        source = torch.arange(count) * sources // count
        share = torch.full((count,), sources / count, dtype=torch.float64)
    trained = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids=ids, trained=trained, source=source, share=share, labels=("",) * count)


def run(launcher, memory, dtype):
    """The weights, the whole of y, and the losses after ten steps; steps of SGD, which rounding
    of small gradients does not turn into whole steps."""
    solver = scalebio(
        warmup=2, lower_optimizer="sgd", lower_lr=0.03, upper_optimizer="sgd", upper_lr=0.5
    )
    result = solve(Random(dtype), solver, steps=10, memory=memory, launcher=launcher)
    assert all(p.device.type == DEVICE for p in leaves(result.y))
    flat = torch.cat([whole(p.detach()).flatten().double().cpu() for p in leaves(result.y)])
    losses = [[row["upper"], row["lower"]] for row in result.history]
    return {"x": result.x, "y": flat, "losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [None, LISA(gamma=1, period=4), LoRA(rank=4)])
@pytest.mark.parametrize("launcher", [FSDP2(), DDP()], ids=["fsdp2", "ddp"])
def test_one_process_under_an_engine_is_one_process(launcher, memory, dtype):
    # sums of gradients in bfloat16 or float32 gave 4e-4 on a CPU; one rounding at one is 2^-7
    near = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 2**-7)}[dtype]
    expected = run(Single(), memory, dtype)
    try:
        found = run(launcher, memory, dtype)
    finally:
        launcher.close()
    assert expected["x"].abs().max() > 0.01  # something has been learned
    assert expected["losses"][-1, 0] < expected["losses"][0, 0] - 0.01
    for part, bound in {"x": near[0], "losses": near[0], "y": near[1]}.items():
        torch.testing.assert_close(found[part], expected[part], rtol=bound, atol=bound)


@pytest.mark.parametrize("share", [False, True])
def test_optimizer_bytes_stay_flat_while_lisa_switches(share):
    solver, launcher, problem = scalebio(warmup=0), Single(), Random(torch.bfloat16)
    memory = LISA(gamma=1, period=1, share=share)
    state = solver.init(problem, memory, launcher, torch.Generator().manual_seed(0))
    held, allocated, drawn = [], [], set()
    for _ in range(12):
        state = solver.step(problem, launcher, state)
        held.append([state.variables[name].memory()["optimizer"] for name in "yz"])
        allocated.append(torch.cuda.memory_allocated() if DEVICE == "cuda" else 0)
        drawn.update(state.memory.active)
    assert len(drawn) > 2
    assert held == [held[0]] * 12 and held[0][0] > 0
    if not share:  # else the twin takes its own of every block that is drawn
        assert max(allocated[2:]) <= 1.01 * min(allocated[2:])


@pytest.fixture
def scale(monkeypatch):
    """benchmarks/scale.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale")


@pytest.mark.parametrize(
    ("shape", "memory", "steps"),
    [
        ("0.5B", "full", 3),
        ("0.5B", "lisa 1", 6),
        ("0.5B", "lora 16", 3),
        ("3B", "lisa 2", 3),
        ("8B", "lisa 1", 18),  # 20 with those before the timed ones
        ("8B", "lora 16", 18),
        ("34B", "lora 16", 3),
    ],
)
def test_the_peak_is_as_planned(scale, monkeypatch, shape, memory, steps):
    monkeypatch.setattr(scale, "STEPS", steps)
    case = scale.Case(shape=shape, memory=memory, plain=False)
    if reason := scale.obstacle(case, case.footprint(), DEVICE, 600.0):
        pytest.skip(reason)
    row = scale.attempt(case, DEVICE, 600.0)
    assert row["outcome"] == "run", row
    assert len(row["times"]) == steps
    assert row["measured / planned"] == pytest.approx(1, abs=0.15), row


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run on two small sources, and the path of one that no other goes on from."""
    folder = tmp_path_factory.mktemp("launchers")
    for name, text in {"good": "one two three", "bad": "qx zv kw", "target": "one two"}.items():
        lines = [json.dumps({"text": f"{text} {i} " * (1 + i % 3)}) for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    found = ["problem=llm_reweight", f"sources={folder}/good.jsonl {folder}/bad.jsonl"]
    found += [f"target={folder}/target.jsonl", "solver=scalebio", "warmup=1", "batch=4"]
    found += ["target_batch=2", "max_length=24", "verdict=false", f"problem.device={DEVICE}"]
    found += ["dtype=float32", "layers=3", "width=32"]
    assert main([*found, "steps=8", f"out={folder / 'whole'}"]) == 0
    return found, path_of(folder / "whole")


@pytest.mark.parametrize("launcher", ["single", "fsdp2", "ddp", "deepspeed"])
def test_a_run_goes_on_under_another_launcher(launcher, words, tmp_path, capsys):
    if launcher == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("needs the package deepspeed")
    words, expected = words
    out = f"out={tmp_path / 'out'}"
    first = start(*words, f"launcher={launcher}", "steps=4", out)
    assert first.returncode == 0, first.stderr[-3000:]
    assert main([*words, "launcher=single", "steps=8", out]) == 0
    assert "going on from" in capsys.readouterr().out
    found = path_of(tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # with Adam's small steps


def start(*words):
    """A run in one process with what torchrun tells its processes; torchrun takes as long again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = os.environ | {name: str(value) for name, value in told.items()}
    command = [sys.executable, "-m", "bilevel.run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=own)


def path_of(out):
    records = [json.loads(line) for line in (out / "trajectory.jsonl").read_text().splitlines()]
    return torch.tensor([[r["upper"], r["lower"], *r["weights"].values()] for r in records])
