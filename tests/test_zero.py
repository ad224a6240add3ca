"""DeepSpeed's engines give what one plain process gives, and say what they cannot do."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes_case import llm
from safetensors.torch import load_file
from test_processes import torchrun
from zero_case import BYTES, CASES, KEPT, RESUMED, branches, run

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
    return folder


@pytest.fixture(scope="module")
def folder(data):
    """What two processes left there, starting in part from what one has saved."""
    run(data, Single(), "plain", 0, steps=KEPT, checkpoints=data / "kept-1")
    done = torchrun(2, HERE / "zero_case.py", data, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return data


@pytest.fixture(scope="module")
def single(data):
    solvers = {solver for _, solver, _ in CASES.values()}
    return {solver: run(data, Single(), solver, 0) for solver in sorted(solvers)}


def close(found, expected, tolerance=1e-5):
    for part in expected.keys() - {"held"}:
        torch.testing.assert_close(found[part], expected[part], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(folder, single, name):
    expected = single[CASES[name][1]]
    assert expected["x"].abs().max() > 0.01  # something has been learned
    close(load_file(folder / f"{name}.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_whoever_saved_it(folder, single, name):
    found = load_file(folder / f"{name}.safetensors")
    close(found, single["plain"])
    if name.endswith("again"):  # nothing has changed, so nothing may differ
        close(found, load_file(folder / f"{name.partition('-')[0]}.safetensors"), tolerance=0)


@pytest.mark.slow
def test_one_process_goes_on_from_two(folder, single):
    shutil.rmtree(folder / "kept-3" / "step-00000010")
    options = {"checkpoints": folder / "kept-3", "resume": True}
    close(run(folder, Single(), "plain", 0, **options), single["plain"])


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
    assert "Step 1: the gradient of y and z is not finite; x has not moved" in words


@pytest.mark.slow
def test_a_process_holds_its_share(folder, single):
    whole = dict(zip(BYTES, single["plain"]["held"].tolist(), strict=True))
    for name, shards in (("zero2", 1), ("zero3", 2)):
        held = load_file(folder / f"{name}.safetensors")["held"].tolist()
        found = dict(zip(BYTES, held, strict=True))
        assert found["value"] == whole["value"] / shards
        # masters that float32 parameters do not need, and the moments of AdamW
        assert found["optimizer"] == pytest.approx((whole["value"] + whole["optimizer"]) / 2, 1e-3)


def test_one_process_under_an_engine_is_one_process():
    expected = branches(Single())[1]
    for stage in (2, 3):  # and a process may join, leave and join again
        launcher = DeepSpeed(stage=stage)
        try:
            _, found = branches(launcher)
        finally:
            launcher.close()
        close(found, expected, tolerance=1e-6)


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
    assert len(faults) == 3
    assert "frozen blocks keep moving and thawed ones never move; use launcher=fsdp2" in faults[0]
    for words in ("solver.growth=1.1 (1 is", "solver.prox=1.0 (0 is", "solver.stencil=2 (1, or"):
        assert words in faults[1]
    assert "launcher.processes=2, but 1 were started" in faults[2]
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
    options = {"stage": 0, "offload": False, "dtype": torch.bfloat16}
    found = zero_config.filled(with_auto | {"train_batch_size": 8}, **options, width=32)
    assert found["gradient_clipping"] == 0.0 and "train_batch_size" not in found
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    zero = found["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1024 and zero["stage3_prefetch_bucket_size"] == 921
    assert zero["stage3_param_persistence_threshold"] == 320  # as accelerate fills them in
    assert found["comms_logger"] == {"enabled": False}
    plain = zero_config.filled({}, **options | {"offload": True}, width=None)
    assert plain["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
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
    monkeypatch.setattr("bilevel.zero.find_spec", lambda name: None)
    (fault,) = bilevel.check(llm(data), scalebio(), launcher=DeepSpeed())
    assert "pip install 'bilevel[deepspeed]'" in fault
    monkeypatch.undo()
    monkeypatch.setattr("bilevel.zero.metadata.version", lambda name: "0.18.2")
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
