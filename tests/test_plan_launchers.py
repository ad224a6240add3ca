"""What launchers share out among devices in a plan, DeepSpeed by its config."""

import dataclasses
import json

import pytest
import torch
from plan_case import LONG, YI

from bilevel import LISA, InputError, forecast
from bilevel.footprint import work
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.llm_reweight import LLMReweight, shapes
from bilevel.problems.llm_reweight.choices import choices
from bilevel.problems.llm_reweight.moments import moments
from bilevel.problems.llm_reweight.operations import traffic
from bilevel.problems.llm_reweight.passes import passes_of
from bilevel.solvers.penalty import scalebio


def test_launchers_share_out_what_they_share_out():
    problem = LLMReweight(model="yi-34b", batch=24, target_batch=8, max_length=1024)
    solver = scalebio()
    does = work(solver, torch.bfloat16)
    of = shapes.shape("yi-34b")
    held = {"reduces": False}
    made = {kind: choices(problem, does, LISA(), kind(**held), 8, of) for kind in (FSDP2, DDP)}
    assert made[FSDP2].weight_shards == made[FSDP2].state_shards == 8
    assert made[DDP].weight_shards == made[DDP].gradient_shards == 1
    for kind in made:  # summed over two passes before they are shared, in float32
        late = moments(of, made[kind], passes_of(problem, 8))["at the lowest block"]
        assert late["gradients"] == made[kind].trained(of) * 4
        both = dataclasses.replace(made[kind], gradients=2)  # a copy waits for the other's
        late = moments(of, both, passes_of(problem, 8))["at the lowest block"]
        first = made[kind].trained(of) * 2 / made[kind].gradient_shards
        assert late["gradients"] == first + made[kind].trained(of) * 4
    cut = choices(problem, does, LISA(), FSDP2(), 8, of)
    late = moments(of, cut, passes_of(problem, 8))["at the lowest block"]
    assert late["gradients"] == cut.trained(of) * 2 / 8
    passes = passes_of(problem, 8)
    assert (passes.rows, passes.lower, passes.upper) == (3, 1, 1)
    received = traffic(of, made[FSDP2], passes, does)
    one = of.total * 2 * 7 / 8  # bytes; forward and backward of three passes gather them
    assert received["gathered weights"] == pytest.approx(6 * one)


ENGINE = ["launcher=deepspeed", "devices=8", "device=h100", *LONG[:2], "problem.dtype=bfloat16"]
N, TRAINS, ADAPTERS = 34_388_917_248, 2_033_225_728, 122_880_000  # of Yi; LISA with two blocks


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # two models; masters and moments of both among eight; in a sweep y's gradient of its first
        # loss, which is there when the second reaches the head
        (["stage=2"], {"weights": 4 * N, "states": 2 * 12 * N / 8, "gradients": 2 * N / 8}),
        (["stage=3"], {"weights": 4 * N / 8, "states": 3 * N, "gradients": 2 * 2 * N / 8}),
        (["stage=3", "offload=true"], {"weights": N / 2, "states": 0.0, "gradients": 0.0}),
        # one base in every process; float32 adapters whole, with masters, moments cut up
        (["stage=2", "lora"], {"weights": 2 * N, "states": 2 * 12 * ADAPTERS / 8}),
        (["stage=3", "lora"], {"weights": N / 4, "states": 2 * 8 * ADAPTERS / 8}),
        (["stage=3", "lisa", "apart"], {"weights": N / 2, "states": 2 * 12 * TRAINS / 8}),
    ],
)
def test_what_zero_shares_out(words, parts):
    kinds = {"lora": ["memory=lora"], "lisa": ["memory=lisa"], "apart": ["memory.share=false"]}
    more = [w for word in words for w in kinds.get(word, [f"launcher.{word}"])]
    head = forecast.make([*YI, *ENGINE, *more]).footprint.moments["at the head"]
    head["states"] = head["master copies and optimizer"]
    for part, size in parts.items():
        assert head[part] == pytest.approx(size, rel=1e-6), part


def test_what_leaves_the_device_is_in_host_memory():
    words = [*YI, *ENGINE, "launcher.offload=true"]
    for stage in (2, 3):
        found = forecast.make([*words, f"launcher.stage={stage}"]).footprint
        # masters and moments 12, the gradient in bfloat16 2 and in float32 4
        assert found.host["states and gradients of both copies"] == pytest.approx(2 * 18 * N)


def test_a_config_decides_what_is_planned(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1e6}
    path.write_text(json.dumps({"zero_optimization": zero}))
    found = forecast.make([*YI, *ENGINE, f"launcher.config={path}"]).footprint
    head = found.moments["at the head"]
    assert head["buffers of gradients"] == 2 * 2 * 2 * 1e6 and "gathered" not in head
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 6e8}
    path.write_text(json.dumps({"zero_optimization": zero}))
    found = forecast.make([*YI, *ENGINE, f"launcher.config={path}"]).footprint
    assert found.moments["at the head"]["weights"] == 0.0
    assert found.moments["at the head"]["gathered"] == 2 * 6e8
    assert found.host["weights"] == 4 * N
    with pytest.raises(InputError, match="memory=lisa at stage 2"):
        forecast.make([*YI, *ENGINE, "memory=lisa", "launcher.stage=2"])
