"""Adapters on a base of four bits: the numbers of the same base in full, a part of its bytes."""

import dataclasses
import json
import sys

import pytest
import torch
from test_memory import Tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import bilevel
import bilevel.run
from bilevel import LISA, Full, InputError, LoRA, Single, forecast
from bilevel.footprint import work
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.llm_reweight import from_records, shapes, training
from bilevel.problems.llm_reweight.choices import choices
from bilevel.problems.llm_reweight.losses import is_direct
from bilevel.quantized import BYTES
from bilevel.solvers.penalty import scalebio
from bilevel.tree import size_bytes
from bilevel.zero import DeepSpeed


def tiny(kind="llama"):
    """Rows of 64 numbers in all linear layers but one, of 96."""
    import transformers as tf

    common = {"vocab_size": 64, "use_cache": False, "tie_word_embeddings": False}
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 96}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **common, bos_token_id=0, eos_token_id=0))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **common))


SOLVER = scalebio(warmup=1, lower_lr=1e-2)


class Kind(Tokens):
    def __init__(self, kind="llama", dtype=torch.float32, change=None):
        self.kind, self.dtype, self.change = kind, dtype, change

    def init(self, generator):
        torch.manual_seed(0)
        model = tiny(self.kind).eval().to(self.dtype)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.data.normal_(std=0.1)
        if self.change:
            self.change(model)
        return torch.zeros(2, dtype=torch.float64), model


def small(**options):
    """The flagship on few short rows."""
    rows = [{"text": f"{letter} {i} " * 3} for letter in "abt" for i in range(12)]
    sources = {"a": rows[:12], "b": rows[12:24]}
    return from_records(sources, target=rows[24:], width=64, batch=4, **options)


def by_hand(layer):
    """W of a four-bit layer from its bytes: two numbers in each, a byte of scale for 64."""
    state, scales = layer.weight.quant_state, layer.weight.quant_state.state2
    packed = layer.weight.data.flatten().int()
    numbers = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten()]
    wide = scales.absmax.repeat_interleave(scales.blocksize)[: state.absmax.numel()]
    scale = scales.code[state.absmax.int()] * wide + state.offset
    return (numbers.view(-1, 64) * scale[:, None]).view(state.shape)


def in_full(quantization):
    """What puts the numbers of four-bit layers into the linear layers of a model."""

    def change(model):
        kind, dtype = type(model), model.dtype
        config = model.config
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            same = kind(config).to(dtype)
            same.load_state_dict(model.state_dict())
            held = LoRA(quantization=quantization).prepare(same, ("y",)).whole
            for name, layer in model.named_modules():
                if isinstance(layer, nn.Linear | Conv1D) and "lm_head" not in name:
                    four = held.get_submodule(name).base_layer
                    rows = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
                    assert (four.weight.dtype == torch.uint8) == (rows.shape[1] == 64)
                    if rows.shape[1] == 64:
                        assert four.weight.quant_state.quant_type == quantization
                        assert (by_hand(four) - rows).abs().mean() < 0.2 * rows.abs().mean()
                        rows.copy_(by_hand(four))

    return change


CASES = [("llama", "nf4", torch.float32), ("llama", "fp4", torch.float32)]
CASES += [("llama", "nf4", torch.bfloat16), ("gpt2", "nf4", torch.float32)]


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("kind", "quantization", "dtype"), CASES)
def test_it_is_the_dense_model_of_the_same_numbers(kind, quantization, dtype):
    problem = Kind(kind, dtype)
    ours = bilevel.solve(problem, SOLVER, steps=5, memory=LoRA(rank=2, quantization=quantization))
    dense = Kind(kind, dtype, in_full(quantization))
    theirs = bilevel.solve(dense, SOLVER, steps=5, memory=LoRA(rank=2))
    untouched = bilevel.solve(problem, SOLVER, steps=5, memory=LoRA(rank=2))
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for a, b in zip(ours.history, theirs.history, strict=True):
        assert a["upper"] == pytest.approx(b["upper"], rel=near["rtol"])
        assert a["lower"] == pytest.approx(b["lower"], rel=near["rtol"])
    assert ours.history != untouched.history
    for p, q in zip(ours.y.parameters(), theirs.y.parameters(), strict=True):
        torch.testing.assert_close(p, q, **near)


def test_gradients_are_those_of_the_dense_model_also_after_an_evaluation():
    _, model = Kind().init(None)
    z = LoRA(rank=2, quantization="nf4").prepare(model, ("y",))
    _, model = Kind(change=in_full("nf4")).init(None)
    dense = LoRA(rank=2).prepare(model, ("y",))
    for p, q in zip(z.parameters(), dense.parameters(), strict=True):
        q.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 10
        p.data = q.data.clone()
    ids = torch.arange(22).view(2, 11)
    with torch.no_grad():  # where bitsandbytes would repack for inference on some processors
        z(input_ids=ids)
    for model in (z, dense):
        model(input_ids=ids).logits.square().mean().backward()
    for p, q in zip(z.parameters(), dense.parameters(), strict=True):
        assert q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_both_copies_share_one_base_of_the_planned_bytes():
    problem = small(layers=3, dtype="float32")
    memory = LoRA(rank=4, quantization="nf4")
    state = SOLVER.init(problem, memory, Single(), torch.Generator().manual_seed(0))
    y, z = (copy.value for copy in state.copies)
    assert y.whole is z.whole
    adapters = {id(p) for copy in (y, z) for p in copy.parameters()}
    base = [p for p in nn.Module.parameters(y.whole) if id(p) not in adapters]
    states = [p.quant_state for p in base if p.dtype == torch.uint8]
    assert len(states) == 3 * 6  # all but the matrix with rows of 170 numbers
    held = size_bytes(base) + size_bytes([t for s in states for t in (s.absmax, s.state2.absmax)])
    of = shapes.shape("tiny", layers=3, width=64)
    of = dataclasses.replace(of, vocabulary=len(problem.tokenizer))
    made = choices(problem, work(SOLVER), memory, Single(), 1, of)
    # a scale of the scales for 256 of them, of which the smallest layers here have fewer
    assert made.model(of) == pytest.approx(held, rel=1e-3)
    matrices = of.blocks * (of.matrices - 64 * 170)
    assert made.model(of) == pytest.approx(4 * (of.total - matrices) + BYTES * matrices)
    assert round(BYTES, 4) == 0.5159
    assert y.whole.lm_head.weight.dtype == torch.float32


def test_a_run_goes_on_bit_for_bit_and_on_its_own_base_only(tmp_path):
    options = {"memory": LoRA(rank=2, quantization="nf4"), "checkpoint_every": 3}
    whole = bilevel.solve(Kind(), SOLVER, steps=7, **options)
    for steps in (3, 7):
        found = bilevel.solve(
            Kind(), SOLVER, steps=steps, checkpoints=tmp_path, resume=True, **options
        )
    assert found.history == whole.history and torch.equal(found.x, whole.x)
    for p, q in zip(found.y.parameters(), whole.y.parameters(), strict=True):
        assert torch.equal(p, q)
    options["memory"] = LoRA(rank=2, quantization="fp4")
    with pytest.raises(InputError, match="adapters of another base model"):
        bilevel.solve(Kind(), SOLVER, steps=9, checkpoints=tmp_path, resume=True, **options)


def test_the_model_waits_in_host_memory_until_it_is_quantized(monkeypatch):
    problem = small(layers=2, device="cpu")
    homes = []
    prepare = LoRA.prepare

    def spy(self, value, names):
        homes.append(getattr(value, "home", None))
        return prepare(self, value, names)

    monkeypatch.setattr(LoRA, "prepare", spy)
    for quantization in ("none", "nf4"):
        memory = LoRA(rank=2, quantization=quantization)
        state = SOLVER.init(problem, memory, Single(), torch.Generator().manual_seed(0))
        fresh = training.fresh(problem, 0, like=state.copies[0].value)
        assert is_direct(fresh.whole)
    assert homes == [None, None, "cpu", "cpu"]
    assert fresh.whole.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    assert getattr(problem.fresh_model(0), "home", None) is None


def test_a_run_by_the_command_line(tmp_path, capsys):
    for name in ("good", "bad", "target"):
        rows = [{"text": f"{name} {i} " * 4} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["problem=llm_reweight", "memory=lora", "memory.rank=2", "layers=1", "batch=4"]
    words += [f"sources='{tmp_path}/good.jsonl' '{tmp_path}/bad.jsonl'", "solver=scalebio"]
    words += ["memory.quantization=nf4", "steps=2", "verdict_steps=1", "verdict_seeds=1"]
    words += [f"target={tmp_path}/target.jsonl", "solver.warmup=0", f"out={tmp_path / 'out'}"]
    assert bilevel.run.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_what_cannot_be_is_told(monkeypatch, capsys):
    memory = LoRA(quantization="nf4")
    for launcher in (FSDP2(), DDP(), DeepSpeed(stage=2)):
        faults = bilevel.check(Tokens(), "penalty", memory=memory, launcher=launcher)
        assert any("not layers of four bits" in fault for fault in faults)
    for other in ("full", "lisa"):
        words = ["problem=llm_reweight", f"memory={other}", "memory.quantization=nf4"]
        assert bilevel.run.main(words) == 2
        assert "quantization" in capsys.readouterr().err
    assert not hasattr(Full(), "quantization") and not hasattr(LISA(), "quantization")
    with pytest.raises(InputError, match="inputs, but those of Sequential have 3, 5; leave"):
        memory.prepare(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), ("y",))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (fault,) = bilevel.check(Tokens(), "penalty", memory=memory)
    assert "pip install 'bilevel[quantized]'" in fault


def test_34_billion_in_four_bits_fit_48_gigabytes():
    words = ["problem=llm_reweight", "problem.model=yi-34b", "memory=lora", "device=a40"]
    words += ["problem.max_length=1025", "problem.micro_batch=2", "problem.checkpointing=true"]
    made = forecast.make([*words, "memory.quantization=nf4"])
    assert made.fits and not forecast.make(words).fits
    # attention 7168 x (7168 + 1024 + 1024 + 7168), three matrices of 7168 x 20480
    matrices = 60 * 7168 * (2 * 7168 + 2 * 1024 + 3 * 20480)
    weights = 0.515869 * matrices + 2 * (34_388_917_248 - matrices)
    assert made.footprint.moments[made.footprint.peak]["weights"] == pytest.approx(weights)
    with pytest.raises(InputError, match=r"memory\.quantization needs launcher=single"):
        forecast.make([*words, "memory.quantization=nf4", "devices=8", "launcher=fsdp2"])
