"""LoRA: two adapters on one base do what two models with adapters do, and hold one base."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_memory import Tokens, tiny
from torch import nn

import bilevel
import bilevel.run
from bilevel import Full, InputError, LoRA, Memory
from bilevel.lora import Adapter
from bilevel.problems.llm_reweight import training
from bilevel.problems.llm_reweight.placement import Placement, place
from bilevel.problems.quadratic import Quadratic
from bilevel.solve import start
from bilevel.solvers.penalty import scalebio
from bilevel.tree import dtypes, named_leaves, size_bytes

SOLVER = scalebio(warmup=2)


class Double(Tokens):
    """In float64, so that rounding cannot hide a difference."""

    def init(self, generator):
        x, y = super().init(generator)
        return x, y.double()


class HandLinear(nn.Module):
    """h = W h0 + scale B A h0, written out; W is no parameter."""

    def __init__(self, layer, a, scale):
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.scale, self.a = scale, nn.Parameter(a.detach().clone())
        self.b = nn.Parameter(a.new_zeros(layer.out_features, len(a)))

    def forward(self, h):
        return h @ self.weight.T + self.scale * (h @ self.a.T) @ self.b.T


class ByHand(Memory):
    """Every copy is a model of its own, with `HandLinear` in the place of its linear layers."""

    def __init__(self, start, scale):
        self.start, self.scale = start, scale

    def prepare(self, value, names):
        for name, a in self.start.items():
            parent, _, last = name.rpartition(".")
            layer = value.get_submodule(name)
            setattr(value.get_submodule(parent), last, HandLinear(layer, a, self.scale))
        for module in value.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if not isinstance(module, HandLinear):
                    delattr(module, name)
                    module.register_buffer(name, p.detach())
        return value

    def init(self, value, generator):
        return Full().init(value, generator)


def adapted(model=None, name="y", **options):
    """An adapter called y on a model, with a twin called z."""
    torch.manual_seed(1)
    return LoRA(rank=2, **options).prepare(model or tiny(), (name, "z"))


def solve(problem=None, *, memory=None, callbacks=(), steps=7, **options):
    made = memory or LoRA(rank=2)
    return bilevel.solve(
        problem or Tokens(), SOLVER, steps=steps, memory=made, callbacks=callbacks, **options
    )


def test_adapters_on_one_base_are_models_with_adapters_written_out():
    ours, theirs = {}, {}

    def keep(into):
        def callback(state, record):
            for name in "yz":
                for path, p in named_leaves(state.variables[name].value).items():
                    into[name, path] = p.detach().clone()

        return callback

    torch.manual_seed(0)  # as a solve begins
    _, base = Double().init(torch.Generator().manual_seed(0))
    y = LoRA(rank=2, alpha=6).prepare(base, ("y", "z"))
    first = {
        n.removeprefix("whole.").removesuffix(".lora_A.y.weight"): p
        for n, p in y.named_parameters()
        if "lora_A" in n
    }
    assert len(first) == 4 * 7  # four blocks of seven matrices, no head
    a = solve(Double(), memory=LoRA(rank=2, alpha=6), callbacks=[keep(ours)])
    b = solve(Double(), memory=ByHand(first, 3.0), callbacks=[keep(theirs)])
    assert a.x.abs().max() > 0.01
    torch.testing.assert_close(a.x, b.x, rtol=1e-9, atol=1e-9)
    assert len(ours) == len(theirs) == 2 * 2 * len(first)
    for (name, path), p in theirs.items():
        module, _, which = path.rpartition(".")
        own = ours[name, f"whole.{module}.lora_{which.upper()}.{name}.weight"]
        torch.testing.assert_close(own, p, rtol=1e-9, atol=1e-9)
    moved = [p.abs().max() for (_, path), p in theirs.items() if path.endswith(".b")]
    assert min(moved) > 0


def test_copies_start_alike_and_x_rests_until_they_differ():
    state = start(Tokens(), SOLVER, memory=LoRA())
    y, z = (state.variables[name].value for name in "yz")
    assert isinstance(y, Adapter) and y.whole is z.whole
    pairs = zip(y.parameters(), z.parameters(), strict=True)
    assert all(torch.equal(p, q) and p is not q for p, q in pairs)
    result = bilevel.solve(Tokens(), scalebio(warmup=0), steps=1, memory=LoRA())
    assert not result.x.any()


def test_the_base_stays_bit_for_bit_and_is_held_once():
    def callback(state, record):
        y, z = (state.variables[name] for name in "yz")
        assert y.value.whole is z.value.whole
        held = sum(p.numel() for p in y.value.whole.parameters())
        adapters = sum(p.numel() for v in (y, z) for p in v.value.parameters())
        assert held == sum(p.numel() for p in tiny().parameters()) + adapters
        for v in (y, z):
            own = set(map(id, v.value.parameters()))
            assert {id(p) for p in v.optimizer.state} == own
            assert v.memory()["value"] == size_bytes(list(v.value.parameters()))

    y = solve(callbacks=[callback]).y
    base = {n: p for n, p in y.whole.named_parameters() if "lora_" not in n}
    torch.manual_seed(0)
    for name, p in tiny().named_parameters():
        name = name if name in base else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(p, base.pop(name))
    assert not base


def test_a_pass_leaves_the_other_adapter_alone():
    y = adapted()
    z = y.twin("z")
    y(input_ids=torch.arange(6).view(1, 6)).logits.sum().backward()
    assert all(p.grad is None for p in z.parameters())
    assert any(p.grad.abs().max() > 0 for p in y.parameters())
    trains = {id(p) for p in y.whole.parameters() if p.requires_grad}
    assert trains == {id(p) for v in (y, z) for p in v.parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_may_overlap(checkpointing):
    """Checkpointed blocks are computed again when the other adapter was used last."""
    y = adapted(place(tiny().double(), Placement(dtype=torch.float64, checkpointing=checkpointing)))
    z = y.twin("z")
    with torch.no_grad():
        for p in z.parameters():
            p.add_(0.1)
    ids = torch.arange(12).view(2, 6)

    def gradients(*orders):
        for order in orders:
            sum(v(input_ids=ids).logits.square().sum() for v in order).backward()
        found = [p.grad.clone() for v in (y, z) for p in v.parameters()]
        y.whole.zero_grad()
        return found

    apart = gradients((y,), (z,))
    for order in ((y, z), (z, y)):
        for p, q in zip(gradients(order), apart, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_checkpoints_hold_adapters_only_and_resume_bit_for_bit(tmp_path):
    def weights(*counts, name):
        for steps in counts:
            result = solve(
                steps=steps, checkpoints=tmp_path / name, checkpoint_every=2, resume=True
            )
        return result

    whole, parts = weights(7, name="whole"), weights(3, 4, 7, name="parts")
    assert whole.x.any() and torch.equal(whole.x, parts.x)
    pairs = zip(whole.y.parameters(), parts.y.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    held = load_file(tmp_path / "whole" / "step-00000007" / "tensors.safetensors").values()
    own = sum(p.numel() for p in whole.y.parameters())
    assert 6 * own <= sum(t.numel() for t in held) < 6.2 * own  # two copies, two moments each

    class Other(Tokens):
        def init(self, generator):
            x, y = super().init(generator)
            for p in y.parameters():
                p.data *= 2
            return x, y

    with pytest.raises(InputError, match="adapters of another base model"):
        solve(Other(), steps=8, checkpoints=tmp_path / "whole", resume=True)


def test_peft_reads_what_is_saved(tmp_path):
    from peft import PeftModel

    y = solve().y
    y.save_pretrained(tmp_path)
    ids = torch.arange(10).view(1, 10)
    torch.manual_seed(0)
    model = tiny()
    plain = model(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(model, tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(loaded, y(input_ids=ids).logits)
    assert (loaded - plain).abs().max() > 0.01
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and "q_proj" in config["target_modules"]


@pytest.mark.parametrize("kind", ["qwen2", "neox", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_any_decoder_takes_adapters(kind, tied):
    y = adapted(tiny(kind, tied))
    ids = torch.arange(6).view(1, 6)
    y(input_ids=ids).logits.square().sum().backward()
    assert not any("lm_head" in n or "embed_out" in n for n, _ in y.named_parameters())
    assert all(p.grad.abs().max() > 0 for n, p in y.named_parameters() if "lora_B" in n)


def test_modules_of_ones_own_take_adapters():
    attention = nn.MultiheadAttention(4, 2)  # reads the weight of its linear layer, never calls it
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 1)), attention)
    y = adapted(model)
    layers = {n.split(".lora_")[0] for n, _ in y.named_parameters()}
    assert layers == {"whole.0", "whole.1.1"}
    chosen = adapted(tiny(), targets=("q_proj", "layers.1.mlp.up_proj")).named_parameters()
    layers = {n.split(".lora_")[0].removeprefix("whole.model.layers.") for n, _ in chosen}
    assert layers == {f"{i}.self_attn.q_proj" for i in range(4)} | {"1.mlp.up_proj"}


def test_what_is_reached_through_an_adapter_computes_with_it():
    y = adapted()
    z = y.twin("z")
    with torch.no_grad():
        for p in z.parameters():
            p.add_(0.1)
    ids = torch.arange(6).view(1, 6)
    expected = z(input_ids=ids).logits
    y(input_ids=ids)
    assert torch.equal(z.lm_head(z.model(ids).last_hidden_state), expected)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        z.nothing_like_it  # noqa: B018


def test_a_base_in_half_precision_has_wide_adapters_and_a_low_penalty():
    class Half(Tokens):
        def init(self, generator):
            x, y = super().init(generator)
            return x, y.bfloat16()

    y = solve(Half(), steps=3).y
    assert {p.dtype for p in y.parameters()} == {torch.float32}
    assert dtypes(y) == {torch.float32, torch.bfloat16}
    solver = scalebio(warmup=0, penalty=1e3, max_penalty=0.0)
    half, single = (bilevel.solve(p, solver, steps=1, memory=LoRA()) for p in (Half(), Tokens()))
    assert half.evidence["penalty"] == 1e2 and single.evidence["penalty"] == 1e3


def test_it_takes_a_part_of_the_memory():
    """Of both copies with two moments each: six models, or one and six adapters."""

    def held(memory):
        kept = []

        def callback(state, record):
            own = [state.variables[name] for name in "yz"]
            moments = [t for v in own for s in v.optimizer.state.values() for t in s.values()]
            shared = [v.value.whole if isinstance(v.value, Adapter) else v.value for v in own]
            values = {id(p): p for module in shared for p in module.parameters()}
            kept.append(size_bytes([*values.values(), *(t for t in moments if t.dim())]))

        y = solve(memory=memory, steps=2, callbacks=[callback]).y
        return kept[-1], size_bytes(list(y.parameters()))

    base = size_bytes(list(tiny().parameters()))
    assert held(Full()) == (6 * base, base)
    ours, adapter = held(LoRA(rank=2))
    assert ours == base + 6 * adapter


def test_a_run_writes_its_adapter_and_judges_with_adapters(tmp_path, capsys, monkeypatch):
    seen = []
    evaluate = training.evaluate

    def spy(model, rows):
        seen.append(model)
        return evaluate(model, rows)

    monkeypatch.setattr(training, "evaluate", spy)
    for name in ("good", "bad", "target"):
        rows = [{"text": f"{name} {i} " * 4} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["problem=llm_reweight", "memory=lora", "memory.rank=2", "width=32", "steps=3"]
    words += ["solver=scalebio", "solver.warmup=0"]  # else both mixtures are one
    words += [f"sources='{tmp_path}/good.jsonl' '{tmp_path}/bad.jsonl'", "batch=4"]
    words += [f"target={tmp_path}/target.jsonl", "verdict_steps=2", "verdict_seeds=1"]
    assert bilevel.run.main([*words, f"out={tmp_path / 'out'}"]) == 0, capsys.readouterr().err
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (2, 32)
    assert len(seen) == 2 and all(isinstance(model, Adapter) for model in seen)
    assert bilevel.run.main([*words, "memory.rank=4", f"out={tmp_path / 'out'}"]) == 2


def test_a_fresh_adapter_is_a_function_of_its_seed():
    first, again, other = (
        [p for n, p in adapted().renewed(tiny(), seed=seed).named_parameters() if "lora_A" in n]
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first, other, strict=True))


def test_what_cannot_be_is_told(monkeypatch):
    with pytest.raises(InputError) as error:
        LoRA(rank=0, alpha=-1)
    assert len(error.value.faults) == 2
    (fault,) = bilevel.check(Quadratic(), "aid", memory=LoRA())
    assert "takes second derivatives of all of y" in fault
    (fault,) = bilevel.check(Quadratic(), "penalty", memory=LoRA())
    assert "needs a lower variable that is an nn.Module, got Tensor" in fault
    faults = {
        "has none": lambda: LoRA().prepare(nn.LayerNorm(3), "y"),
        "has no linear layer q; its linear layers are called 0.": lambda: LoRA(
            targets=("q",)
        ).prepare(nn.Sequential(nn.Linear(2, 2)), "y"),
        "merge them with merge_and_unload": lambda: LoRA().prepare(adapted().whole, "y"),
    }
    for words, call in faults.items():
        with pytest.raises(InputError, match=words.replace(".", r"\.")):
            call()

    class Bound(Tokens):
        def project_lower(self, y):
            return y

    (fault,) = bilevel.check(Bound(), "penalty", memory=LoRA())
    assert "memory=lora cannot project" in fault
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.17.1")
    (fault,) = bilevel.check(Tokens(), "penalty", memory=LoRA())
    assert "needs peft 0.18 or newer, found 0.17.1" in fault


def test_a_missing_peft_is_told_before_anything_is_loaded(monkeypatch):
    class Never(Tokens):
        def init(self, generator):
            raise AssertionError

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'bilevel\[llm\]'"):
        solve(Never())


def test_peft_is_not_imported_before_it_is_needed():
    code = "import sys, bilevel, bilevel.options; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
