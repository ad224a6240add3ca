"""The bytes of a plan, against runs, counted storage and published tables."""

from copy import deepcopy

import pytest
import torch
from plan_case import MIXED, NEOX, QWEN, TOP, YI, bytes_of, folder

from bilevel import LISA, Full, InputError, Single, forecast
from bilevel.blocks import parameter_groups
from bilevel.footprint import work
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import LLMReweight, rehearsal, shapes
from bilevel.problems.llm_reweight.choices import Choices
from bilevel.problems.llm_reweight.moments import activations, moments
from bilevel.problems.llm_reweight.passes import Passes
from bilevel.solvers.penalty import f2sa, proximal, scalebio
from bilevel.storage import fake


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
        forecast.make(["problem=llm_reweight", "solver=aid"])
    with pytest.raises(InputError, match="no gradient of y"):
        forecast.make(["problem=llm_reweight", "solver=zo"])


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
    made = forecast.make([*YI, *ONE_CARD, *words])
    assert made.fits and not forecast.make([*YI, *ONE_CARD, *words][:-1]).fits
    assert made.footprint.total / 1e9 - 2.5 == pytest.approx(gigabytes, abs=0.05)


def test_what_waits_in_host_memory_is_planned():
    made = forecast.make([*YI, *ONE_CARD, "memory.gamma=1", "memory.offload=states"])
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
        forecast.make([*YI, *MIXED, "memory.offload=idle"])


def test_no_process_loads_all_of_a_model_that_is_cut_up():
    one = forecast.make([*YI, *ONE_CARD, "memory.gamma=1", "memory.offload=states"]).footprint.host
    assert one["model, whole in every process while it is loaded"] == 2 * 34_388_917_248
    words = ["launcher=fsdp2", "devices=8", "device=a40", "batch=8", "target_batch=8"]
    several = forecast.make([*YI, *words]).footprint.host
    (read,) = [n for name, n in several.items() if "while the model is read" in name]
    assert read == 2 * 64_000 * 7_168  # a part of the embedding in each of eight


@pytest.mark.slow
def test_a_step_of_34_billion_on_one_card_is_counted():
    words = ["device=h100", "memory.gamma=1", "memory.offload=states", "batch=4", "target_batch=2"]
    made = forecast.make([*YI, *ONE_CARD, *words])
    _, peak = forecast.measure(made)
    assert peak + 2.5e9 < made.card.usable
    assert peak == pytest.approx(made.footprint.total - 2.5e9, rel=0.03)


def test_a_frozen_block_of_yi_keeps_what_was_counted_once():
    of, made = shapes.shape("yi-34b"), Choices(checkpointing=False)
    counted = 13.7e9 / 1024 / 60  # bytes of a token in a block, by a fake-tensor run of all of it
    assert activations(of, made, trained=False) == pytest.approx(counted, rel=0.05)


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
    parts = moments(of, Choices(**choices), passes)
    parts.pop("in the optimizer's step")  # which the table leaves out
    found = max(sum(part.values()) for part in parts.values()) / 1e9
    assert found == pytest.approx(gigabytes, abs=tolerance)


@pytest.mark.parametrize(("choices", "gigabytes", "tolerance"), TABLE)
def test_what_stays_is_the_table_less_its_working_memory(choices, gigabytes, tolerance):
    of, passes = shapes.shape("yi-34b"), Passes(rows=2, length=1024, lower=1, upper=0)
    made = Choices(**choices)
    parts = moments(of, made, passes)["at the lowest block"]
    stays = ("weights", "adapters", "master copies and optimizer", "gradients", "context and slack")
    working = 2.4 + 7.4 * made.gathers - made.gathers * bool(made.rank) * 0.4
    found = sum(parts[name] for name in stays) / 1e9 + working
    assert found == pytest.approx(gigabytes, abs=1.05 if made.rank else 0.1)
