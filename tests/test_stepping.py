"""Steps of one parameter after the other: the numbers of one call for all, in less memory."""

import pytest
import torch
from test_memory import Tokens
from test_offload import Half, held

import bilevel
from bilevel import forecast, remedies
from bilevel.memory import LISA, Full
from bilevel.precision import with_precision
from bilevel.problems.llm_reweight import LLMReweight, rehearsal
from bilevel.problems.quadratic import Quadratic
from bilevel.run import main
from bilevel.solve import start
from bilevel.solvers.penalty import VPBGD, Penalty, scalebio
from bilevel.stepping import in_parts, with_step
from bilevel.storage import fake
from bilevel.variable import optimizer_by_name
from bilevel.zero import memory_faults

STEPS = ("whole", "parts")
SOLVERS = {
    "scalebio": scalebio(warmup=2, lower_lr=1e-2, clip=1.0),
    "central": Penalty(inner_steps=2, warmup=1, growth=1.1, lower_optimizer="adam", lower_lr=1e-2),
    "prox": Penalty(stencil=1, inner_steps=2, warmup=1, prox=1.0, momentum=0.5),
    "vpbgd": VPBGD(inner_steps=2, rise=3),
}


def run(problem, solver, memory, steps=5):
    """The state at the end and the losses on the way."""
    state, losses = start(problem, solver, memory=memory), []
    for _ in range(steps):
        state = solver.step(problem, bilevel.Single(), state)
        losses.append((state.upper, state.lower))
    return state, losses


def same(problem, solver, memories):
    (plain, losses), (parts, found) = (run(problem, solver, memory) for memory in memories)
    assert found == losses
    pairs = list(zip(held(parts), held(plain), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    return plain


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_order_of_a_step_changes_no_number(solver):
    same(Tokens(), SOLVERS[solver], [Full(stepping=step) for step in STEPS])


@pytest.mark.parametrize("precision", ["master", "stochastic", "plain"])
def test_half_precision_is_rounded_alike(precision):
    for kind, more in ((Full, {}), (LISA, {"gamma": 1, "period": 2})):
        memories = [kind(precision=precision, stepping=step, **more) for step in STEPS]
        state = same(Half(), SOLVERS["scalebio"], memories)
        roundings = state.variables["y"].optimizer.param_groups[0].get("roundings")
        assert roundings == (5 if precision == "stochastic" else None)


@pytest.mark.parametrize("offload", ["idle", "states"])
def test_copies_in_host_memory_step_alike(offload):
    memories = [LISA(gamma=1, period=2, offload=offload, stepping=step) for step in STEPS]
    same(Half(), SOLVERS["scalebio"], memories)


@pytest.mark.parametrize("solver", ["aid", "sama", "darts", "bome"])
def test_other_families_step_alike(solver):
    found = [bilevel.solve(Quadratic(), solver, steps=5, memory=Full(stepping=s)) for s in STEPS]
    assert torch.equal(found[0].x, found[1].x) and torch.equal(found[0].y, found[1].y)
    assert found[0].history == found[1].history


def test_a_run_goes_on_the_other_way_bit_for_bit(tmp_path):
    def solve(steps, step, **more):
        memory = LISA(gamma=1, period=2, precision="stochastic", stepping=step)
        return bilevel.solve(Half(), scalebio(warmup=1), steps=steps, memory=memory, **more)

    whole = solve(9, "whole")
    for steps, step in ((3, "parts"), (5, "whole"), (9, "parts")):
        more = {"checkpoints": tmp_path, "checkpoint_every": 1, "resume": True}
        found = solve(steps, step, **more)
    assert found.history == whole.history
    for a, b in zip(found.y.parameters(), whole.y.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_without_a_gradient_counts_as_ever():
    ends = []
    for step in STEPS:
        generator = torch.Generator().manual_seed(0)
        factory = with_precision(optimizer_by_name("sgd", 1e-3), "stochastic", generator)
        leaves = [torch.ones(50, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        optimizer = with_step(factory, step)(leaves)
        for number in range(4):
            for p in leaves if number % 2 else ():
                p.grad = torch.full_like(p, 0.3)
            optimizer.step()
            assert step == "whole" or all(p.grad is None for p in leaves)
        ends.append([p.detach() for p in leaves])
        assert optimizer.param_groups[0]["roundings"] == 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_that_fails_leaves_all_parameters_to_the_optimizer():
    leaves = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = in_parts(lambda own: torch.optim.SGD(own, lr=0.1))(leaves)

    def fail(*_):
        raise ZeroDivisionError

    hook = optimizer.register_step_pre_hook(fail)
    for p in leaves:
        p.grad = torch.ones_like(p)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [*map(id, leaves)]
    optimizer.step()
    assert all(p.detach().eq(0.9).all() and p.grad is None for p in leaves)


def test_what_a_step_takes_is_that_of_one_parameter():
    size, count, peaks = 10_000, 8, {}
    for step in STEPS:
        with fake() as storage:
            generator = torch.Generator().manual_seed(0)
            factory = with_precision(optimizer_by_name("adamw", 1e-3), "master", generator)
            leaves = [torch.empty(size, dtype=torch.bfloat16) for _ in range(count)]
            optimizer = with_step(factory, step)([p.requires_grad_() for p in leaves])
            for _ in range(2):  # the first makes master and moments
                for p in leaves:
                    p.grad = torch.empty_like(p)
                before = storage.live
                storage.reset()
                optimizer.step()
            peaks[step] = storage.peak - before
            assert before - storage.live == pytest.approx(2 * size * count, abs=100)
            del optimizer, leaves, p
    # gradients in float32 rather than bfloat16, of all or of one; on a CPU two temporaries of one
    # parameter, and where another is stepped after it one that is left
    assert peaks["whole"] == pytest.approx(2 * size * count + 3 * 4 * size, rel=0.02)
    assert peaks["parts"] == pytest.approx(2 * size + 2 * 4 * size, rel=0.02)


@pytest.mark.parametrize(("memory", "more"), [(Full, {}), (LISA, {"gamma": 1})])
def test_the_peak_is_the_planned_one(memory, more):
    size = {"layers": 2, "width": 128, "batch": 3, "target_batch": 1}
    options = {"max_length": 3, "dtype": "bfloat16"}
    problem, solver = LLMReweight(**size, **options), scalebio(warmup=0)
    peaks = {}
    for step in STEPS:
        _, peak = rehearsal.measured(problem, solver, memory(stepping=step, **more))
        words = [f"problem.{k}={v}" for k, v in (size | options).items()]
        words += ["problem=llm_reweight", f"memory={memory.__name__.lower()}", "steps=2"]
        words += [f"memory.{k}={v}" for k, v in more.items()]
        made = forecast.make(
            [*words, f"memory.stepping={step}", "device=here", "problem.device=cpu"]
        )
        parts = made.footprint.moments["in the optimizer's step"]
        around = ("interpreter and libraries", "freed memory that malloc keeps")
        assert made.footprint.peak == "in the optimizer's step"
        planned = sum(n for name, n in parts.items() if name not in around)
        assert planned == pytest.approx(peak, rel=0.02)
        peaks[step] = peak
    # of all numbers that train but those of the largest parameter, float32 beside bfloat16
    others = made.footprint.trained - made.footprint.parameters["embedding"]
    assert peaks["whole"] - peaks["parts"] >= 0.98 * 2 * others


YI = ["problem=llm_reweight", "problem.model=yi-34b", "problem.dtype=bfloat16"]
YI += ["problem.max_length=1025", "problem.micro_batch=2", "problem.checkpointing=true"]
N = 34_388_917_248
ENGINE = ["launcher=fsdp2", "devices=8", "batch=24", "target_batch=8"]


@pytest.mark.parametrize(
    ("words", "bytes_"),
    [
        # a share of two models, of 24 bytes of states for each number, and of one gradient; of the
        # largest parameter a gradient in float32 instead of bfloat16, and a temporary
        (["memory=full", *ENGINE, "device=h200"], (4 * N + 24 * N + 2 * N + 6 * 458_752_000) / 8),
        # four blocks: all weights once, 12 bytes of states and 2 of a gradient
        (
            [
                "memory=lisa",
                "memory.gamma=4",
                "memory.pool=8",
                "memory.offload=idle",
                "device=h200",
            ],
            2 * N + 14 * 3_148_938_240 + 6 * 458_752_000,
        ),
    ],
)
def test_the_step_of_34_billion_is_planned(words, bytes_):
    whole, parts = (forecast.make([*YI, *words, f"memory.stepping={step}"]) for step in STEPS)
    step = parts.footprint.moments["in the optimizer's step"]
    assert sum(step.values()) == pytest.approx(bytes_ + 2.5e9, rel=1e-3)
    assert whole.footprint.peak == "in the optimizer's step" != parts.footprint.peak
    others = {k: v for k, v in whole.footprint.moments.items() if k != "in the optimizer's step"}
    assert others == {k: parts.footprint.moments[k] for k in others}


def test_a_plan_that_does_not_fit_tells_of_it():
    made = forecast.make([*YI, "memory=full", *ENGINE, "device=h200"])
    assert not made.fits and forecast.make([*made.words, "memory.stepping=parts"]).fits
    assert remedies.remedies(made)[0][0] == ("memory.stepping=parts",)


def test_what_cannot_step_so_is_told_before_the_start():
    options = {"lower_optimizer": "prodigy"}
    for memory in (
        Full(stepping="parts"),
        LISA(stepping="parts"),
        LISA(stepping="parts", offload="idle"),
    ):
        (fault,) = memory.check(constrained=False, direct=[], options=options)
        assert "memory.stepping=parts" in fault and "solver.lower_optimizer=prodigy" in fault
        assert memory.check(constrained=False, direct=[], options={"lower_optimizer": "Adam"}) == []
    assert Full().check(constrained=False, direct=[], options=options) == []
    for stage in (2, 3):
        assert "memory.stepping has no effect" in memory_faults(Full(stepping="parts"), stage)[0]
        assert memory_faults(Full(), stage) == []


def test_the_command_line_takes_it_and_goes_on_the_other_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("sea", "law", "port"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i} {name}" for i in range(40)))
    words = ["problem=llm_reweight", "problem.sources=sea.txt law.txt", "problem.target=port.txt"]
    words += ["problem.batch=4", "verdict=false", "problem.dtype=bfloat16"]
    for out, step, total in (("whole", "whole", 2), ("parts", "parts", 1), ("parts", "whole", 2)):
        assert main([*words, f"out={out}", f"steps={total}", f"memory.stepping={step}"]) == 0
    one, two = (tmp_path / step / "trajectory.jsonl" for step in STEPS)
    assert one.read_bytes() == two.read_bytes()
    assert main([*words, "out=no", "memory.stepping=fused"]) == 2
    assert "whole" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch finds none")
def test_a_gpu_gets_the_same_numbers_and_needs_less():
    size, count, ends, peaks = 2**22, 8, [], []
    for step in STEPS:
        factory = with_precision(
            optimizer_by_name("adamw", 1e-3), "master", torch.Generator().manual_seed(0)
        )
        leaves = [torch.ones(size, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
        optimizer = with_step(factory, step)([p.requires_grad_() for p in leaves])
        for number in (1, 2):
            for p in leaves:
                p.grad = torch.full_like(p, 0.1 * number)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            peak = torch.cuda.max_memory_allocated() - before
        ends.append([p.detach().float().cpu() for p in leaves])
        peaks.append(peak)
        del optimizer, leaves, p
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert peaks[0] > 5 * size * count  # float32 gradients beside bfloat16 ones, and a temporary
    assert peaks[1] < 20 * size
