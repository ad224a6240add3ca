"""The operations of a planned step, against those that torch counts."""

import dataclasses

import pytest
import torch
from plan_case import TOP
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bilevel import LISA, Full, Single
from bilevel.blocks import parameter_groups
from bilevel.footprint import work
from bilevel.problems.llm_reweight import LLMReweight, footprint, rehearsal, shapes
from bilevel.problems.llm_reweight.choices import Choices, choices
from bilevel.problems.llm_reweight.model import example_losses
from bilevel.problems.llm_reweight.operations import pass_flops
from bilevel.problems.llm_reweight.passes import Passes
from bilevel.solvers.penalty import f2sa2, scalebio


def trained(model, memory):
    """Freeze what the strategy would; LISA's blocks from the top."""
    groups = parameter_groups(model)
    count = len(groups["blocks"])
    names = {n for i in range(count - memory.gamma, count) for n in groups["blocks"][i]}
    names.update(n for p in ("embedding", "head", "norms") if getattr(memory, p) for n in groups[p])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


KERNELS = {  # torch's counter knows the CUDA kernels only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *a, **kw: sdpa_backward_flop_count(g, q, k, v)
    ),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("solver", [scalebio(warmup=0), f2sa2(inner_steps=2, warmup=0)])
def test_operations_of_a_step_are_those_that_torch_counts(again, trunk, solver):
    size = {"layers": 4, "width": 64, "batch": 6, "target_batch": 3, "micro_batch": 3}
    problem = LLMReweight(**size, max_length=65, dtype="float32", checkpointing=again)
    memory = dataclasses.replace(TOP, trunk=trunk)
    does = work(solver)
    planned = problem.unread().footprint(does, memory, Single(), 1, 3).flops
    stage = rehearsal._Stage(problem=problem, model=rehearsal._model(problem, "cpu"))
    state = solver.init(stage, memory, Single(), torch.Generator().manual_seed(0))
    state = solver.step(stage, Single(), state)
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        solver.step(stage, Single(), state)
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("memory", [None, LISA(gamma=1), LISA(gamma=2, head=False)])
@pytest.mark.parametrize("again", [False, True])
def test_operations_are_those_that_torch_counts(memory, again):
    problem = LLMReweight(
        layers=4, width=64, max_length=65, dtype="float32", checkpointing=again, loss_chunk=64
    )
    model = rehearsal._model(dataclasses.replace(problem)).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    if memory:
        trained(model, memory)
    batch = rehearsal._Stage(problem=problem)._rows([65] * 4, 1)
    example_losses(model, batch, chunk=64).sum()  # finds out how the model makes its logits
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        example_losses(model, batch, chunk=64).sum().backward()
    of, passes = footprint._shape(problem), Passes(rows=4, length=64, lower=1, upper=0)
    work_ = work(scalebio())
    made = choices(problem, work_, memory or Full(), Single(), 1, of)
    counted = counter.get_total_flops()
    assert pass_flops(of, made, passes) * passes.tokens == pytest.approx(counted, rel=1e-3)


def test_operations_of_yi_are_those_of_the_published_arithmetic():
    of = shapes.shape("yi-34b")
    short = Passes(rows=1, length=0, lower=1, upper=0)  # without attention's quadratic part
    whole = {"chunk": 10**9}
    last = 2 * 60 * 7168 * 20480 / 1e9  # which the published numbers compute again, and torch not
    cases = {
        (60, False): 203.6,
        (60, True): 270.5 - last,
        (1, False): 137.8,
        (1, True): 204.7 - last,
    }
    for (blocks, again), want in cases.items():
        made = Choices(blocks=blocks, checkpointing=again, **whole)
        assert pass_flops(of, made, short) / 1e9 == pytest.approx(want, abs=0.06)
    depths = []
    for gamma in (1, 2, 4):
        frozen = Choices(blocks=gamma, ends=("head",), checkpointing=False, **whole)
        none = dataclasses.replace(frozen, ends=("head", "embedding"))
        saved = pass_flops(of, none, short) - pass_flops(of, frozen, short)
        depths.append(round(1 - saved / (2 * of.matrices * of.blocks), 2))
    assert depths == [0.51, 0.68, 0.81]  # the mean over LISA's draws
