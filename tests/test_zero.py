"""DeepSpeed's engines give what one plain process gives, and say what they cannot do."""

import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processes_case import Tied, llm
from safetensors.torch import load_file
from test_processes import torchrun
from zero_case import (
    BYTES,
    CASES,
    KEPT,
    MEMORIES,
    PLANNED,
    RESUMED,
    SAVED,
    branches,
    run,
    whole_parameters,
)

import bilevel
from bilevel import LISA, Full, InputError, Single, zero_config
from bilevel.check import options as fit
from bilevel.options import parse
from bilevel.problems.quadratic import Quadratic
from bilevel.solvers.penalty import VPBGD, Penalty, scalebio
from bilevel.zero import DeepSpeed

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed: pip install 'bilevel[deepspeed]'"
)

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "benchmarks" / "configs"

JSON = {  # as the examples of transformers have it
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    words = {
        "good": "one two three",
        "fair": "one red blue",
        "bad": "qx zv kw",
        "target": "one two",
    }
    for name, text in words.items():
        rows = [{"text": f"{text} {i} " * (1 + i % 3)} for i in range(16 + len(name))]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "ds.json").write_text(json.dumps(JSON))
    own = JSON["zero_optimization"] | {"offload_param": {"device": "cpu", "pin_memory": False}}
    (folder / "host.json").write_text(json.dumps(JSON | {"zero_optimization": own}))
    return folder


@pytest.fixture(scope="module")
def folder(data):
    """What two processes left there, starting in part from what one has saved."""
    for memory, kept in (("full", "kept-1"), ("lisa", "lisa-1"), ("lora", "lora-1")):
        run(data, Single(), memory, "plain", 0, steps=KEPT, checkpoints=data / kept)
    done = torchrun(2, HERE / "zero_case.py", data, "run", timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return data


@pytest.fixture(scope="module")
def single(data):
    """What one process gives, by memory and solver."""
    wanted = {case[1:3] for case in CASES.values()}
    return {key: run(data, Single(), *key, 0) for key in sorted(wanted)}


def close(found, expected, tolerance=1e-5):
    for part in sorted(expected.keys() - {"held"}):
        torch.testing.assert_close(found[part], expected[part], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(folder, single, name):
    expected = single[CASES[name][1:3]]
    assert expected["x"].abs().max() > 0.01  # something has been learned
    close(load_file(folder / f"{name}.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_whoever_saved_it(folder, single, name):
    found, uninterrupted = load_file(folder / f"{name}.safetensors"), RESUMED[name][2]
    close(found, single[CASES[uninterrupted][1], "plain"])
    if name.endswith("again"):  # nothing has changed, so nothing may differ
        close(found, load_file(folder / f"{uninterrupted}.safetensors"), tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_one_process_goes_on_from_two(folder, single, name):
    memory = SAVED[name][1]
    options = {"checkpoints": folder / f"{name}-as-saved", "resume": True}
    close(run(folder, Single(), memory, "plain", 0, **options), single[memory, "plain"])


@pytest.mark.slow
def test_sizes_that_cannot_be_shared_evenly(folder):
    """Values, moments and counts after three steps; what pads the shards is a number too."""
    found, expected = (
        load_file(folder / f"{name}.safetensors") for name in ("odd", "odd-expected")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [(folder / f"odd-{rank}.txt").read_text() for rank in (0, 1)] == ["True", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_passes_may_reach_different_parts(folder, stage, offload):
    _, expected = branches(Single())
    close(load_file(folder / f"branches-{stage}-{offload}.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_run(folder, stage, offload):
    words = (folder / f"broken-{stage}-{offload}.txt").read_text()
    assert "Step 1: the gradient of y is not finite; neither it nor x has moved" in words


def held(found):
    """Bytes of the end by part."""
    return dict(zip(BYTES, found["held"][-1].tolist(), strict=True))


@pytest.mark.slow
def test_a_process_holds_its_share(folder, single):
    whole = held(single["full", "plain"])
    for name, shards in (("zero2", 1), ("zero3", 2)):
        found = held(load_file(folder / f"{name}.safetensors"))
        assert found["value"] == whole["value"] / shards
        # masters that float32 parameters do not need, and the moments of AdamW
        assert found["optimizer"] == pytest.approx((whole["value"] + whole["optimizer"]) / 2, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["lisa", "lora", "lisa-often"])
def test_only_what_trains_has_states_and_all_is_cut_up(folder, single, name, rank):
    whole = held(single[CASES[f"zero3-{name}"][1], "plain"])
    found = load_file(folder / f"zero3-{name}.safetensors.{rank}")
    for part in ("value", "optimizer"):  # plus a count and a padded entry for each parameter
        assert held(found)[part] == pytest.approx(whole[part] / 2, rel=5e-3), part
    assert len(set(found["held"][:, BYTES.index("optimizer")].tolist())) == 1  # over all switches


@pytest.mark.slow
def test_an_adapter_has_states_beside_a_whole_base(folder, single):
    whole = held(single["lora", "plain"])
    found = held(load_file(folder / "zero2-lora.safetensors"))
    assert found["value"] == whole["value"]
    adapters = whole["optimizer"] / 2  # of both moments of each number
    assert found["optimizer"] == pytest.approx(3 / 2 * adapters, rel=5e-3)  # with masters, cut up


@pytest.mark.slow
def test_a_process_holds_what_was_planned(tmp_path):
    done = torchrun(2, HERE / "zero_case.py", tmp_path, "plan", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "bytes.json").read_text())
    assert found.keys() == PLANNED.keys()
    for name, (measured, planned) in found.items():
        assert sum(measured.values()) == pytest.approx(sum(planned.values()), rel=0.02), name
        assert bool(planned["on the host"]) == name.endswith("offload")
        parts = BYTES if not planned["on the host"] else ("value",)
        for part in parts:
            assert measured[part] == pytest.approx(planned[part], rel=0.02), (name, part)


FORMS = [*((s, "full") for s in (2, 3)), *((s, "lora") for s in (2, 3)), (3, "lisa"), (3, "apart")]


@pytest.mark.parametrize(("stage", "memory"), FORMS)
def test_one_process_under_an_engine_is_one_process(data, stage, memory):
    solver = scalebio(warmup=1, lower_optimizer="sgd", lower_lr=0.1, clip=0.5)
    options = {"steps": 3, "memory": replace_period(MEMORIES[memory])}
    with closing(DeepSpeed(stage=stage)) as launcher:  # who leaves may join again
        found = bilevel.solve(llm(data), solver, launcher=launcher, **options)
        parts = whole_parameters(found.y)
    expected = bilevel.solve(llm(data), solver, **options)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-6)
    for name, p in expected.y.named_parameters():
        torch.testing.assert_close(parts[name], p.detach(), rtol=1e-6, atol=1e-6)


def replace_period(memory):
    return replace(memory, period=1) if isinstance(memory, LISA) else memory


class Untied(Tied):
    """The same with a head of its own, in float32."""

    def init(self, generator):
        x, model = super().init(generator)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return x.float(), model.float()


class Float(Tied):
    """The same in float32; every loss of y is two passes."""

    def init(self, generator):
        x, model = super().init(generator)
        return x.float(), model.float()


def test_what_is_frozen_neither_moves_nor_holds_anything():
    memory, seen = LISA(gamma=1, period=1), []

    def look(state, record):
        y = state.variables["y"]
        named = dict(y.value.named_parameters())
        holding = {n for n, p in named.items() if y.optimizer.state.get(y.holder.piece(p))}
        assert holding == {n for n, p in named.items() if p.requires_grad}
        seen.append((state.memory.active, {n: p.ds_tensor.clone() for n, p in named.items()}))

    options = {"steps": 4, "memory": memory}
    expected = bilevel.solve(Float(), scalebio(warmup=0, lower_optimizer="sgd"), **options)
    with closing(DeepSpeed(stage=3)) as launcher:
        options["launcher"] = launcher
        found = bilevel.solve(Float(), scalebio(warmup=0, lower_optimizer="sgd"), **options)
        parts = whole_parameters(found.y)
        bilevel.solve(Float(), scalebio(warmup=0), callbacks=[look], **options)
    for name, p in expected.y.named_parameters():  # embedding and head are tied
        torch.testing.assert_close(parts[name], p.detach(), rtol=1e-6, atol=1e-6)
    assert len({tuple(active) for active, _ in seen}) > 1
    for (_, before), (active, after) in pairwise(seen):
        moved = {name.split(".")[2] for name, p in after.items() if not p.equal(before[name])}
        assert moved & {"0", "1", "2"} == {str(i) for i in active}


def test_a_block_is_gathered_only_while_it_is_used():
    """Copies share blocks; a block that looked ahead would wait for its own backward pass."""
    free, hooks = [], []

    def note(block, inputs, output, others):
        held = [p.ds_status.name for other in others for p in other.parameters()]
        free.append(set(held) == {"NOT_AVAILABLE"})

    def watch(state, record):
        if not hooks:
            models = [state.variables[name].value for name in "yz"]
            own = dict.fromkeys(block for model in models for block in model.model.layers)
            for part in [*own, *(model.lm_head for model in models)]:
                others = [other for other in own if other is not part]
                hooks.append(part.register_forward_hook(partial(note, others=others)))

    with closing(DeepSpeed(stage=3)) as launcher:
        options = {"launcher": launcher, "callbacks": [watch], "memory": LISA(gamma=1)}
        bilevel.solve(Untied(), scalebio(warmup=0), steps=4, **options)
    assert len(hooks) == 6  # z has a block and a head of its own, and borrows two blocks
    assert len(free) == 3 * (3 + 2) * 4 and all(free)  # steps, passes of y and z, hooks in a pass


def test_processes_that_count_differently_are_refused(monkeypatch):
    launcher = DeepSpeed()
    launcher.open()
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(InputError, match=r"not clear: 2 \(WORLD_SIZE\), 1 \(torch.distributed"):
            launcher.open()
    finally:
        launcher.close()


def test_what_cannot_run_is_told_together(data):
    launcher = DeepSpeed(processes=2)
    faults = bilevel.check(llm(data), Penalty(prox=1.0), launcher=launcher, memory=LISA())
    assert len(faults) == 2
    for words in ("solver.growth=1.1 (1 is", "solver.prox=1.0 (0 is", "solver.stencil=2 (1, or"):
        assert words in faults[0]
    assert "launcher.processes=2, but 1 were started" in faults[1]
    memory = LISA(offload="idle")
    faults = bilevel.check(llm(data), scalebio(), launcher=DeepSpeed(stage=2), memory=memory)
    assert len(faults) == 2
    assert "memory=lisa at stage 2: ZeRO-2 makes flat buffers" in faults[0]
    assert "thawed ones never move; use stage 3, or launcher=fsdp2" in faults[0]
    assert "memory.offload has no effect" in faults[1]
    (fault,) = bilevel.check(llm(data), VPBGD(), launcher=DeepSpeed())
    assert "solver=VPBGD" in fault
    (fault,) = bilevel.check(Quadratic(), "aid", launcher=DeepSpeed())
    assert "second derivatives" in fault
    adafactor = scalebio(lower_optimizer="adafactor")
    (fault,) = bilevel.check(llm(data), adafactor, launcher=DeepSpeed())
    assert "solver.lower_optimizer=adafactor cannot; choose from sgd" in fault
    memory = Full(precision="stochastic")
    (fault,) = bilevel.check(llm(data), scalebio(), launcher=DeepSpeed(), memory=memory)
    assert "use memory.precision=master" in fault


def test_a_tree_is_refused():
    with pytest.raises(InputError, match=r"needs a lower variable that is an nn.Module"):
        bilevel.solve(Quadratic(), scalebio(), steps=1, launcher=DeepSpeed())


def faults_of(data, monkeypatch, config, **options):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (data / "own.json").write_text(config if isinstance(config, str) else json.dumps(config))
    launcher = DeepSpeed(config=str(data / "own.json"), **options)
    problem = replace(llm(data, 3), dtype="float32")
    return fit(problem, scalebio(clip=1.0), Full(), launcher)


def test_a_config_that_agrees_is_accepted_unchanged(data, monkeypatch):
    assert faults_of(data, monkeypatch, JSON) == []
    for path in CONFIGS.glob("deepspeed-*.json"):
        assert faults_of(data, monkeypatch, path.read_text()) == [], path


CONTRADICTIONS = [
    ({"train_batch_size": 16}, "train_batch_size=16, but the run has problem.batch=12"),
    ({"gradient_accumulation_steps": 4}, "which make it 2"),
    ({"train_micro_batch_size_per_gpu": 6}, "which make it 3"),
    ({"gradient_clipping": 0.5}, "gradient_clipping=0.5, but the run has solver.clip=1.0"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb"),
    ({"optimizer": {"params": {"lr": 1e-5}}}, "lr=1e-05, but the run has solver.lower_lr=0.001"),
    ({"optimizer": {"params": {"weight_decay": 0.5}}}, "which steps with weight_decay=0.01"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}, "scheduler WarmupLR"),
    ({"bf16": {"enabled": True}}, "bf16.enabled=True, but the run has problem.dtype=float32"),
    ({"fp16": {"enabled": True}}, "fp16.enabled=true"),
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage=1, expected 2 or 3"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device=nvme"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "rounds what is gathered"),
    ({"compression_training": {"enabled": True}}, "switches compression_training on"),
    ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation=True, expected False"),
    ("{", "own.json cannot be read"),
    ([], "must hold a JSON object, got list"),
]


@pytest.mark.parametrize(("config", "words"), CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_a_contradiction_names_both(data, monkeypatch, config, words):
    (fault,) = faults_of(data, monkeypatch, config)
    assert words in fault


def test_all_contradictions_are_told_together(data, monkeypatch):
    config = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 2}, "fp16": {"enabled": 1}}
    faults = faults_of(data, monkeypatch, config, stage=3)
    assert len(faults) == 3 and "zero_optimization.stage=2, but the run has" in faults[1]
    config = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    (fault,) = faults_of(data, monkeypatch, config, offload=True)
    assert "offload_optimizer.device=none, but the run has launcher.offload=true" in fault


def test_what_an_engine_gets():
    with_auto = {"zero_optimization": JSON["zero_optimization"], "comms_logger": {"enabled": False}}
    options = {"stage": 0, "offload": False, "dtype": torch.bfloat16, "most": 2000}
    found = zero_config.filled(with_auto | {"train_batch_size": 8}, **options, width=32)
    assert found["gradient_clipping"] == 0.0 and "train_batch_size" not in found
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    zero = found["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1024 and zero["stage3_prefetch_bucket_size"] == 921
    assert zero["stage3_param_persistence_threshold"] == 320  # as accelerate fills them in
    assert found["comms_logger"] == {"enabled": False}
    plain = zero_config.filled({}, **options | {"offload": True}, width=None)
    assert plain["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": 2000,  # no larger than what trains
    }
    with pytest.raises(InputError, match=r'"auto" for zero_optimization.sub_group_size'):
        zero_config.filled({"zero_optimization": {"sub_group_size": "auto"}}, **options, width=32)


def test_the_command_line_knows_it(data):
    sources = [f"sources={data}/good.jsonl {data}/bad.jsonl", f"target={data}/target.jsonl"]
    words = ["problem=llm_reweight", *sources, "launcher=deepspeed", "launcher.stage=2"]
    assert parse(words).launcher == DeepSpeed(stage=2)
    with pytest.raises(InputError) as caught:
        parse([*words[:-1], "launcher.stage=1"])
    assert caught.value.faults == ("launcher.stage must be 0, 2 or 3, got 1.",)


def test_without_deepspeed_the_extra_is_named(data, monkeypatch):
    monkeypatch.setattr("bilevel.zero_package.find_spec", lambda name: None)
    (fault,) = bilevel.check(llm(data), scalebio(), launcher=DeepSpeed())
    assert "pip install 'bilevel[deepspeed]'" in fault
    monkeypatch.undo()
    monkeypatch.setattr("bilevel.zero_package.metadata.version", lambda name: "0.18.2")
    (fault,) = bilevel.check(llm(data), scalebio(), launcher=DeepSpeed())
    assert "0.19.8 or newer, found 0.18.2" in fault


def test_what_accelerate_launch_was_given_counts(data, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    assert zero_config.read("") == {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 1.0,
    }
    (fault,) = fit(llm(data), scalebio(), Full(), DeepSpeed())
    assert "gradient_clipping=1.0, but the run has solver.clip=0.0" in fault
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(data / "ds.json"))
    assert zero_config.read("") == JSON
    (fault,) = fit(llm(data), scalebio(), Full(), DeepSpeed(config="other.json"))
    assert "launcher.config=other.json, but accelerate launch was given" in fault
