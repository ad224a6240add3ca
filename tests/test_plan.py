"""The planner: its arithmetic against models, counted storage and counted operations."""

import dataclasses
import json
import resource
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bilevel import LISA, Full, InputError, Single, plan
from bilevel.blocks import parameter_groups
from bilevel.cards import CARDS, find
from bilevel.footprint import work
from bilevel.fsdp import DDP, FSDP2
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import LLMReweight, footprint, rehearsal, shapes
from bilevel.problems.llm_reweight.choices import Choices, choices
from bilevel.problems.llm_reweight.footprint import Passes
from bilevel.problems.llm_reweight.model import example_losses
from bilevel.solvers.penalty import f2sa, f2sa2, proximal, scalebio
from bilevel.storage import fake

YI = ["problem=llm_reweight", "problem.model=yi-34b"]
MIXED = ["memory=lisa", "launcher=fsdp2", "devices=8", "device=a40"]
LONG = ["problem.max_length=1024", "problem.checkpointing=true", "problem.micro_batch=1"]
TOP = LISA(gamma=1, pool=1, pool_from="top", embedding=False)
NEOX = {"model_type": "gpt_neox", "hidden_act": "gelu_fast", "vocab_size": 1000}
NEOX |= {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
NEOX |= {"num_attention_heads": 8, "max_position_embeddings": 256, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen2", "vocab_size": 40000, "hidden_size": 128, "intermediate_size": 512}
QWEN |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
QWEN |= {"max_position_embeddings": 256, "tie_word_embeddings": True}


def folder(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def meta(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shapes.config(name))


# shapes


@pytest.mark.parametrize("name", [*shapes.PRESETS, "tiny", "qwen3"])
def test_parameters_of_every_part_are_those_of_the_model(name, tmp_path):
    if name == "qwen3":
        name = folder(tmp_path, QWEN | {"model_type": "qwen3", "head_dim": 32})
    model, of = meta(name), shapes.shape(name)
    groups, sizes = parameter_groups(model), {n: p.numel() for n, p in model.named_parameters()}
    assert {sum(map(sizes.get, names)) for names in groups["blocks"]} == {of.block}
    for part in ("embedding", "head", "norms"):
        assert sum(map(sizes.get, groups[part])) == getattr(of, part), part
    assert of.total == sum(sizes.values())
    matrices = [p for n, p in model.named_parameters() if n in groups["blocks"][0] and p.dim() == 2]
    assert sorted(of.linears) == sorted(tuple(p.shape[::-1]) for p in matrices)


def test_published_totals():
    published = {"llama-3-8b": 8_030_261_248, "qwen-2.5-32b": 32_763_876_352}
    published |= {"yi-34b": 34_388_917_248, "gpt-neox-20b": 20_554_567_680}
    assert {name: shapes.shape(name).total for name in published} == published


def test_adapters_of_yi_are_those_of_the_published_arithmetic():
    assert shapes.shape("yi-34b").adapters(16) == 122_880_000  # 16 * 60 * sum of in + out


@pytest.mark.parametrize("name", ["tiny", "yi-34b", "gpt-neox-20b", "qwen-2.5-0.5b"])
def test_linear_layers_have_the_names_and_sizes_of_the_model(name):
    linear = {
        n: (layer.in_features, layer.out_features)
        for n, layer in meta(name).named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert shapes.shape(name).layers() == linear


# q and v of 60 blocks: 7168 -> 7168 and 7168 -> 8 x 128; the head 7168 -> 64000
ADAPTED = {
    ("q_proj", "v_proj"): 16 * 60 * (7168 + 7168 + 7168 + 1024),
    ("self_attn.q_proj",): 16 * 60 * (7168 + 7168),
    ("layers.7.mlp.down_proj", "lm_head"): 16 * (20480 + 7168 + 7168 + 64000),
}


@pytest.mark.parametrize("targets", ADAPTED, ids="+".join)
def test_chosen_layers_are_planned(targets):
    words = [*YI, "memory=lora", f"memory.targets={' '.join(targets)}", "device=h200"]
    found = plan.make(words).footprint
    assert found.trained == ADAPTED[targets]
    parts = found.moments["at the head"]
    assert parts["adapters"] == 2 * 4 * ADAPTED[targets]
    assert found.total < plan.make([*YI, "memory=lora", "device=h200"]).footprint.total


def test_layers_that_are_not_there_are_told_as_a_run_tells_them():
    with pytest.raises(InputError, match=r"yi-34b has no linear layer q_lin; its linear layers"):
        plan.make([*YI, "memory=lora", "memory.targets=q_lin"])


# bytes that stay


@pytest.mark.parametrize(
    "memory",
    [Full(), LISA(gamma=1, embedding=False), LoRA(rank=4), LoRA(rank=4, targets=("v_proj",))],
)
def test_weights_gradients_and_states_are_those_held_by_a_run(memory):
    problem = LLMReweight(layers=4, width=64, dtype="float32", verdict=False)
    solver = scalebio(warmup=0)
    gathered, copies = [], []

    class Watched(Single):
        def step(self, variables):
            gathered.append(sum(copy.memory()["gradient"] for copy in copies))
            super().step(variables)

    state = solver.init(problem, memory, Watched(), torch.Generator().manual_seed(0))
    copies += state.copies
    for _ in range(2):
        state = solver.step(problem, Watched(), state)
    held = [state.variables[n].memory() for n in "yz"]
    parts = bytes_of(problem, solver, memory)["in the optimizer's step"]
    values = parts["adapters" if isinstance(memory, LoRA) else "weights"]
    assert values == pytest.approx(sum(h["value"] for h in held), rel=0.02)
    assert parts["gradients"] == pytest.approx(max(gathered), rel=0.02)
    assert parts["master copies and optimizer"] == pytest.approx(
        sum(h["optimizer"] for h in held), rel=0.02
    )


def bytes_of(problem, solver, memory, **changes):
    """The moments of one process on a CPU, where the optimizer steps tensor by tensor."""
    of, passes = footprint._shape(problem), footprint._rows(problem, 1)
    does = work(solver, problem.number(memory), memory)
    made = choices(problem, does, memory, Single(), 1, of)
    return footprint.moments(of, dataclasses.replace(made, foreach=False, **changes), passes)


def test_work_is_what_a_solver_does():
    found = work(proximal())
    assert (found.copies, found.upper, found.lower) == (2, 10, 20)
    assert (found.held, found.kept) == (0, 8)  # plain sgd; a center for each of two copies
    assert (work(scalebio(), torch.bfloat16).held, work(scalebio(), torch.bfloat16).width) == (
        12,
        4,
    )
    assert work(f2sa(lower_optimizer="adamw")).held == 8
    assert work(f2sa()).gradients == found.gradients == 2 and work(scalebio()).gradients == 1
    with pytest.raises(InputError, match="second derivatives"):
        plan.make(["problem=llm_reweight", "solver=aid"])
    with pytest.raises(InputError, match="no gradient of y"):
        plan.make(["problem=llm_reweight", "solver=zo"])


# the peak


CASES = [
    ("tiny", Full(), "float32", False),
    ("tiny", LISA(gamma=1), "bfloat16", True),
    ("tiny", TOP, "float32", False),
    ("tiny", TOP, "bfloat16", True),
    ("neox", LISA(gamma=1), "float32", True),
    pytest.param("neox", LISA(gamma=1), "bfloat16", False, marks=pytest.mark.slow),
    ("qwen", Full(), "bfloat16", True),
]


@pytest.mark.parametrize(("model", "memory", "dtype", "again"), CASES)
def test_activations_are_those_counted_on_fake_tensors(model, memory, dtype, again, tmp_path):
    configs = {"neox": NEOX, "qwen": QWEN}
    name = folder(tmp_path, configs[model]) if model in configs else model
    size = {"layers": 4, "width": 128, "batch": 8, "target_batch": 4, "micro_batch": 4}
    options = {
        "model": name,
        "max_length": 33 if model == "qwen" else 129,
        "dtype": dtype,
        "checkpointing": again,
    }
    options |= {"loss_chunk": 16 * (model == "qwen")}
    problem, solver = LLMReweight(**size, **options), scalebio(warmup=0)
    between, peak = rehearsal.measured(problem, solver, memory)
    moments = bytes_of(problem, solver, memory)
    for parts in moments.values():
        parts["context and slack"] = 0.0
        fixed = parts["weights"] + parts["master copies and optimizer"] + parts["adapters"]
        fixed += parts.get("output of the trunk", 0.0) / 3  # of f, for which z has no use
        assert fixed == pytest.approx(between, rel=1e-3)
    most = max(sum(parts.values()) for parts in moments.values())
    assert most - fixed == pytest.approx(peak - between, rel=0.15)


@pytest.mark.parametrize("offload", ["idle", "states"])
def test_a_peak_with_copies_in_host_memory_is_that_counted(offload):
    size = {"layers": 4, "width": 128, "batch": 8, "target_batch": 4, "micro_batch": 4}
    problem = LLMReweight(**size, max_length=129, dtype="bfloat16", checkpointing=True)
    solver, memory = scalebio(warmup=0), LISA(gamma=1, offload=offload)
    between, peak = rehearsal.measured(problem, solver, memory)
    moments = bytes_of(problem, solver, memory)
    for parts in moments.values():
        parts["context and slack"] = 0.0
    head = moments["at the head"]
    here = head["weights"] + head["master copies and optimizer"]
    if offload == "states":  # between steps both copies are away
        model = rehearsal._model(problem)
        groups, named = parameter_groups(model), dict(model.named_parameters())
        rest = [n for block in groups["blocks"][1:] for n in block]
        assert between == pytest.approx(sum(2 * named[n].numel() for n in rest), rel=1e-3)
    else:
        assert between == pytest.approx(here, rel=1e-3)
    most = max(sum(parts.values()) for parts in moments.values())
    assert most - here == pytest.approx(peak - here, rel=0.15)


ONE_CARD = ["problem.max_length=1025", "problem.micro_batch=2", "problem.checkpointing=true"]
ONE_CARD += ["memory=lisa", "memory.pool=8", "problem.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("words", "gigabytes"),
    [
        # 68.78 weights + gradients of 1.475 (3.149) billion + 1.76 at the blocks + 2.95 at the head
        (["device=h100", "memory.gamma=1", "memory.offload=states"], 68.78 + 2.95 + 1.76 + 2.95),
        (["device=h100", "memory.gamma=4", "memory.offload=states"], 68.78 + 6.30 + 1.76 + 2.95),
        # 12 bytes of states, a gradient in float32, a temporary of its size
        (["device=h200", "memory.gamma=4", "memory.offload=idle"], 68.78 + 3.149 * (12 + 4 + 4)),
    ],
)
def test_34_billion_fit_one_card(words, gigabytes):
    made = plan.make([*YI, *ONE_CARD, *words])
    assert made.fits and not plan.make([*YI, *ONE_CARD, *words][:-1]).fits
    assert made.footprint.total / 1e9 - 2.5 == pytest.approx(gigabytes, abs=0.05)


def test_what_waits_in_host_memory_is_planned():
    made = plan.make([*YI, *ONE_CARD, "memory.gamma=1", "memory.offload=states"])
    found = made.footprint
    # eight blocks, both ends and a norm in bfloat16; 16 bytes for each number that trains
    away = 2 * (8 * 557_856_768 + 2 * 458_752_000 + 7168) + 16 * 1_475_367_936
    assert found.swapped == pytest.approx(2 * away, rel=1e-6)
    assert made.swap_seconds == pytest.approx(4 * away / 50e9, rel=1e-6)
    assert made.seconds == made.compute_seconds + made.swap_seconds
    # the step of an end after the first draw: all else of its copy is away, the rest is shared
    end, shared = 458_752_000, 34_388_917_248 - 1_475_367_936
    step = sum(found.moments["in the optimizer's step"].values())
    assert step == pytest.approx(2 * shared + 22 * end + 2.5e9, rel=1e-6)
    pinned = found.host["what is away from the device, pinned"]
    assert 2 * away < pinned < 4 * away
    with pytest.raises(InputError, match=r"memory\.offload needs launcher=single"):
        plan.make([*YI, *MIXED, "memory.offload=idle"])


def test_no_process_loads_all_of_a_model_that_is_cut_up():
    one = plan.make([*YI, *ONE_CARD, "memory.gamma=1", "memory.offload=states"]).footprint.host
    assert one["model, whole in every process while it is loaded"] == 2 * 34_388_917_248
    words = ["launcher=fsdp2", "devices=8", "device=a40", "batch=8", "target_batch=8"]
    several = plan.make([*YI, *words]).footprint.host
    (read,) = [n for name, n in several.items() if "while the model is read" in name]
    assert read == 2 * 64_000 * 7_168  # a part of the embedding in each of eight


@pytest.mark.slow
def test_a_step_of_34_billion_on_one_card_is_counted():
    words = ["device=h100", "memory.gamma=1", "memory.offload=states", "batch=4", "target_batch=2"]
    made = plan.make([*YI, *ONE_CARD, *words])
    _, peak = plan.measure(made)
    assert peak + 2.5e9 < made.card.usable
    assert peak == pytest.approx(made.footprint.total - 2.5e9, rel=0.03)


def test_a_frozen_block_of_yi_keeps_what_was_counted_once():
    of, made = shapes.shape("yi-34b"), Choices(checkpointing=False)
    counted = 13.7e9 / 1024 / 60  # bytes of a token in a block, by a fake-tensor run of all of it
    assert footprint.activations(of, made, trained=False) == pytest.approx(counted, rel=0.05)


def test_copies_are_counted_once():
    with fake() as storage:
        copy = deepcopy(torch.nn.Linear(100, 100, bias=False))
        held = copy(torch.empty(1, 100, requires_grad=True)).sum()  # which keeps the weight
        assert storage.live == pytest.approx(40_000, abs=1000) and held.dim() == 0


def test_storage_is_counted_until_it_is_freed():
    with fake() as storage:
        a = torch.empty(1000)
        b = a * 2
        view = b.view(10, 100)
        assert storage.live == 8000
        c = torch.cat([a, b])
        del a, c
        assert (storage.live, storage.peak) == (4000, 16000)
        del b
        assert storage.live == 4000
        del view
        assert storage.live == 0
        storage.reset()
        assert storage.peak == 0
        real = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        assert sorted(real.tolist()) == list(range(9))
        assert float(torch.empty(3).sum()) == 1.0


# operations


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
    assert footprint.pass_flops(of, made, passes) * passes.tokens == pytest.approx(
        counted, rel=1e-3
    )


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
        assert footprint.pass_flops(of, made, short) / 1e9 == pytest.approx(want, abs=0.06)
    depths = []
    for gamma in (1, 2, 4):
        frozen = Choices(blocks=gamma, ends=("head",), checkpointing=False, **whole)
        none = dataclasses.replace(frozen, ends=("head", "embedding"))
        saved = footprint.pass_flops(of, none, short) - footprint.pass_flops(of, frozen, short)
        depths.append(round(1 - saved / (2 * of.matrices * of.blocks), 2))
    assert depths == [0.51, 0.68, 0.81]  # the mean over LISA's draws


# the table of 34B, GB


EIGHT = dict.fromkeys(("weight_shards", "gradient_shards", "state_shards"), 8)
EIGHT |= {"gathers": True, "ends_apart": False}
OWNED = {"bases": 1, "resident": 1, "at_once": False}
LOW = {"bases": 1, "held": 8.0, "gradient": 4.0}
TABLE = [
    ({"blocks": 1} | EIGHT, 34.7, 1.0),
    ({"blocks": 2} | EIGHT, 36.6, 1.0),
    ({"blocks": 4} | EIGHT, 40.5, 1.0),
    ({"blocks": 60} | EIGHT, 149.9, 2.0),  # the table has all activations with all gradients
    ({"rank": 16} | LOW, 76.6, 1.1),  # the table leaves the gradients of adapters out
    ({"rank": 16} | LOW | EIGHT, 20.7, 2.5),  # the table reduces a whole block, not its adapters
    ({"blocks": 1} | OWNED | EIGHT, 23.3, 1.0),
    ({"blocks": 1} | OWNED, 92.5, 1.3),  # here the head's gradient exists three times in chunks
    ({"blocks": 1, "held": 4.0} | OWNED, 80.7, 1.3),
]


@pytest.mark.parametrize(("choices", "gigabytes", "tolerance"), TABLE)
def test_the_arithmetic_gives_the_table_of_34_billion(choices, gigabytes, tolerance):
    of, passes = shapes.shape("yi-34b"), Passes(rows=2, length=1024, lower=1, upper=0)
    moments = footprint.moments(of, Choices(**choices), passes)
    moments.pop("in the optimizer's step")  # which the table leaves out
    found = max(sum(parts.values()) for parts in moments.values()) / 1e9
    assert found == pytest.approx(gigabytes, abs=tolerance)


@pytest.mark.parametrize(("choices", "gigabytes", "tolerance"), TABLE)
def test_what_stays_is_the_table_less_its_working_memory(choices, gigabytes, tolerance):
    of, passes = shapes.shape("yi-34b"), Passes(rows=2, length=1024, lower=1, upper=0)
    made = Choices(**choices)
    parts = footprint.moments(of, made, passes)["at the lowest block"]
    stays = ("weights", "adapters", "master copies and optimizer", "gradients", "context and slack")
    working = 2.4 + 7.4 * made.gathers - made.gathers * bool(made.rank) * 0.4
    found = sum(parts[name] for name in stays) / 1e9 + working
    assert found == pytest.approx(gigabytes, abs=1.05 if made.rank else 0.1)


# launchers


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
        late = footprint.moments(of, made[kind], footprint._rows(problem, 8))["at the lowest block"]
        assert late["gradients"] == made[kind].trained(of) * 4
        both = dataclasses.replace(made[kind], gradients=2)  # a copy waits for the other's
        late = footprint.moments(of, both, footprint._rows(problem, 8))["at the lowest block"]
        first = made[kind].trained(of) * 2 / made[kind].gradient_shards
        assert late["gradients"] == first + made[kind].trained(of) * 4
    cut = choices(problem, does, LISA(), FSDP2(), 8, of)
    late = footprint.moments(of, cut, footprint._rows(problem, 8))["at the lowest block"]
    assert late["gradients"] == cut.trained(of) * 2 / 8
    passes = footprint._rows(problem, 8)
    assert (passes.rows, passes.lower, passes.upper) == (3, 1, 1)
    traffic = footprint._traffic(of, made[FSDP2], passes, does)
    one = of.total * 2 * 7 / 8  # bytes; forward and backward of three passes gather them
    assert traffic["gathered weights"] == pytest.approx(6 * one)


# the command line


def run(capsys, *words):
    code = plan.main(words)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_the_plan_of_34_billion_fits_eight_cards(capsys):
    code, out, err = run(capsys, *YI, *MIXED, *LONG)
    assert (code, err) == (0, "")
    assert "fits" in out and "34.389 (blocks 33.471, embedding 0.459, head 0.459" in out
    assert "problem.target_batch=8 rather than 6" in out
    assert "Computed from shapes; nothing was run on a device" in out


def test_json_has_the_same_numbers(capsys):
    code, out, _ = run(capsys, *YI, *MIXED, "--json")
    body = json.loads(out)
    found = body["footprint"]
    assert code == 0 and body["fits"]
    assert found["total"] == pytest.approx(sum(found["moments"][found["peak"]].values()))
    assert body["spare"] == pytest.approx(CARDS["a40"].usable - found["total"])
    machine = 8 * CARDS["a40"].flops * 0.4
    assert body["compute_seconds"] == pytest.approx(found["flops"] / machine)


def test_what_would_fit_does_fit(capsys):
    words = ["problem=llm_reweight", "problem.model=llama-3-8b", "device=a40"]
    code, out, _ = run(capsys, *words, "memory=full", "problem.max_length=1024", "--json")
    body = json.loads(out)
    assert code == 1 and not body["fits"] and body["remedies"]
    totals = []
    for remedy in body["remedies"]:
        keep = [
            w
            for w in words
            if w.partition("=")[0] not in {c.partition("=")[0] for c in remedy["change"]}
        ]
        made = plan.make([*keep, "problem.max_length=1024", *remedy["change"]])
        assert made.fits
        totals.append(made.footprint.total == pytest.approx(remedy["total"]))
    assert all(totals)


def test_options_of_a_replaced_part_go_with_it():
    words = ("memory=lisa", "memory.gamma=4", "devices=2", "batch=8")
    assert plan._changed(words, ("memory=full", "problem.batch=4")) == (
        "devices=2",
        "memory=full",
        "problem.batch=4",
    )


def test_a_step_of_the_real_code_is_counted(capsys):
    words = ["problem=llm_reweight", "dtype=float32", "--measure", "--json"]
    body = json.loads(run(capsys, *words)[1])
    counted, found = body["counted_on_fake_tensors"], body["footprint"]
    slack = found["moments"][found["peak"]]["context and slack"]
    assert counted["peak"] == pytest.approx(found["total"] - slack, rel=0.1)
    with pytest.raises(InputError, match="one process"):
        plan.measure(plan.make([*YI, *MIXED]))
    with pytest.raises(InputError, match="memory=lora cannot be counted"):
        plan.measure(plan.make(["problem=llm_reweight", "memory=lora"]))


def test_all_faults_are_told_together(capsys):
    words = ["problem=llm_reweight", "problem.model=yi-34", "devices=8", "device=h10"]
    code, out, err = run(capsys, *words, "launcher=single", "problem.batch=20", "mfu=2")
    assert (code, out) == (2, "")
    assert "did you mean yi-34b?" in err and "did you mean h100?" in err
    assert "problem.batch must be a multiple of devices=8, got 20" in err
    assert "launcher=single uses one device, got devices=8" in err
    assert "mfu must be in (0, 1]" in err
    assert err.count("error:") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=0"], "devices must be at least 1, got devices=0"),
        (["devices=two"], "devices must be a whole number"),
        (["devices=1", "devices=1"], "devices is given twice"),
        (["problem.max_length=1"], "problem.max_length must be at least 2"),
        (["memory=lisa", "memory.gamma=3"], "at most the number of blocks, 2, got 3"),
        (["problem.attention=eager"], "problem.attention=eager"),
        (["problem.max_length=9000"], "at most 2048 tokens"),
        (["nonsense=1"], "unknown key nonsense"),
        (["problem=toy"], "does not say what it needs"),
    ],
)
def test_wrong_input_is_told(capsys, words, message):
    first = [] if words[0].startswith("problem=") else ["problem=llm_reweight"]
    code, _, err = run(capsys, *first, *words)
    assert code == 2 and message in err


def test_unknown_strategies_and_launchers_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Sparse(Full):
        pass

    @dataclasses.dataclass(frozen=True)
    class Cloud(Single):
        pass

    problem, does = LLMReweight(), work(scalebio())
    with pytest.raises(InputError) as error:
        footprint.footprint(problem, does, Sparse(), Cloud(), 1, 1)
    assert error.value.faults == (
        "memory=sparse cannot be planned yet.",
        "launcher=cloud cannot be planned yet.",
    )


def test_shapes_that_cannot_be_planned_are_refused(tmp_path):
    name = folder(tmp_path, {"model_type": "gpt2"})
    with pytest.raises(InputError, match="is a gpt2, whose sizes"):
        shapes.shape(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        shapes.shape(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no model_type"):
        shapes.shape(name)


def test_cards_name_their_source():
    assert find("H200").usable == 149e9
    assert all(card.source and card.usable < 150e9 for card in CARDS.values())


def test_34_billion_are_planned_in_seconds_without_memory():
    command = [sys.executable, "-m", "bilevel.plan", *YI, *MIXED]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert busy < 20  # of the processor: the wall clock depends on who else is there
    assert after.ru_maxrss * 1024 < 2e9  # kB on Linux


def test_the_time_is_that_of_all_seeds(capsys):
    words = ("problem=llm_reweight", "steps=100")
    one, three = (
        json.loads(run(capsys, *words, seeds, "--json")[1]) for seeds in ("seeds=1", "seeds=3")
    )
    assert (one["steps"], one["seeds"], three["steps"], three["seeds"]) == (100, 1, 100, 3)
    assert three["run_seconds"] == pytest.approx(3 * one["run_seconds"])
    step = max(one["compute_seconds"], one["traffic_seconds"]) + one["swap_seconds"]
    assert one["run_seconds"] == pytest.approx(100 * step)
    made = plan.make([*words, "seeds=3", "device=here"])
    said = "\n".join(plan.lines(made, timed=(2.0, 1e9)))
    assert f"100 steps of 3 seeds: {plan.duration(made.steps * made.seconds)} by" in said
    assert "measured here: 2.00 s a step, 100 steps of 3 seeds 10.0 minutes" in said


# DeepSpeed


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
    head = plan.make([*YI, *ENGINE, *more]).footprint.moments["at the head"]
    head["states"] = head["master copies and optimizer"]
    for part, size in parts.items():
        assert head[part] == pytest.approx(size, rel=1e-6), part


def test_what_leaves_the_device_is_in_host_memory():
    words = [*YI, *ENGINE, "launcher.offload=true"]
    for stage in (2, 3):
        found = plan.make([*words, f"launcher.stage={stage}"]).footprint
        # masters and moments 12, the gradient in bfloat16 2 and in float32 4
        assert found.host["states and gradients of both copies"] == pytest.approx(2 * 18 * N)


def test_a_config_decides_what_is_planned(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1e6}
    path.write_text(json.dumps({"zero_optimization": zero}))
    found = plan.make([*YI, *ENGINE, f"launcher.config={path}"]).footprint
    head = found.moments["at the head"]
    assert head["buffers of gradients"] == 2 * 2 * 2 * 1e6 and "gathered" not in head
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 6e8}
    path.write_text(json.dumps({"zero_optimization": zero}))
    found = plan.make([*YI, *ENGINE, f"launcher.config={path}"]).footprint
    assert found.moments["at the head"]["weights"] == 0.0
    assert found.moments["at the head"]["gathered"] == 2 * 6e8
    assert found.host["weights"] == 4 * N
    with pytest.raises(InputError, match="memory=lisa at stage 2"):
        plan.make([*YI, *ENGINE, "memory=lisa", "launcher.stage=2"])
