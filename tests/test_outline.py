"""A model that processes read by parts is the one that a process loads whole, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts_case import BY_PARTS, MODELS, problem_of, tensors
from safetensors.torch import load_file, save_file

import bilevel
from bilevel import processes
from bilevel.fsdp import FSDP2
from bilevel.outline import Files, attach, stood_in
from bilevel.problems.llm_reweight import parts
from bilevel.problems.llm_reweight.model import tiny_tokenizer
from bilevel.solvers.penalty import scalebio
from bilevel.tree import digest

HERE = Path(__file__).parent


def made(kind, vocabulary):
    """A small model with random numbers and biases."""
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        LlamaConfig,
        MixtralConfig,
        Qwen2Config,
    )

    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    ends |= {"vocab_size": vocabulary, "tie_word_embeddings": kind in ("tied", "gpt2", "untied")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 3, "num_key_value_heads": 2, **ends}
    match kind:
        case "gpt2":
            config = GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, **ends)
        case "tied":
            config = Qwen2Config(**size)
        case "experts":
            config = MixtralConfig(num_local_experts=2, **size)
        case _:
            config = LlamaConfig(**size)
    torch.manual_seed(len(kind))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    return model.half() if kind == "half" else model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved models, and what two processes make of them."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer(["one two three four five six seven"])
    for kind in (*MODELS[1:], "untied"):
        size = "30KB" if kind == "several" else "1GB"
        made(kind, 271).save_pretrained(folder / kind, max_shard_size=size)
        tokenizer.save_pretrained(folder / kind)
    file = folder / "untied" / "model.safetensors"
    held = load_file(file)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    save_file(held, file, metadata={"format": "pt"})
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *starter, HERE / "parts_case.py", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_parts_are_the_whole_bit_for_bit(folder):
    for case in json.loads((folder / "done.json").read_text()):
        model, dtype, memory, _ = case
        found = load_file(folder / f"{'-'.join(case)}.safetensors")
        expected = tensors(problem_of(folder, model, dtype), memory, bilevel.Single())
        assert found.keys() == expected.keys(), case
        for name in found.keys() - {"held"}:
            assert found[name].dtype == expected[name].dtype, (case, name)
            assert found[name].equal(expected[name]), (case, name)


@pytest.mark.parametrize("model", MODELS)
def test_only_what_needs_it_is_sent(folder, model):
    if model == "tiny":
        return
    problem = problem_of(folder, model)
    places = parts._places(parts._empty(problem), problem.model)
    assert bool(places) == (model in BY_PARTS)
    assert (len(set(places.values())) > 3) == (model == "several")


def test_what_is_read_is_what_digests_tell(folder):
    """The first entries, which tell processes with other files, and bases of adapters."""
    for model in ("several", "gpt2", "half"):
        problem = problem_of(folder, model, "bfloat16")
        empty = parts._empty(problem)
        attach(empty, Files(empty, parts._places(empty, problem.model)))
        assert digest(empty) == digest(problem.fresh_model(0))


def test_files_that_another_process_lacks_are_told_by_it(folder):
    problem = problem_of(folder, "llama")
    empty = parts._empty(problem)
    places = parts._places(empty, problem.model)
    lost = Files(empty, dict.fromkeys(places, folder / "none.safetensors"))
    with pytest.raises(processes.ProcessError, match=r"process 0 .* need the same files"):
        lost.read({"lm_head.weight": torch.zeros(271, 32)})


def test_what_stands_in_for_numbers_leaves_nothing_behind(folder):
    model = parts._empty(problem_of(folder, "tied"))
    was = dict(model.named_parameters(remove_duplicate=False))
    with stood_in(model):
        inside = dict(model.named_parameters(remove_duplicate=False))
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        inside["model.norm.weight"].requires_grad_(False)
    assert logits.isfinite().all() and logits.std() > 0.1
    assert inside["lm_head.weight"] is inside["model.embed_tokens.weight"]
    assert sum(p.untyped_storage().nbytes() for p in inside.values()) < 60_000
    now = dict(model.named_parameters(remove_duplicate=False))
    assert all(now[name] is p and p.is_meta for name, p in was.items())
    assert {n for n, p in now.items() if not p.requires_grad} == {"model.norm.weight"}


def test_a_model_that_sees_ahead_is_refused_before_its_numbers_are_read(folder, monkeypatch):
    from transformers.models.llama import modeling_llama

    problem = problem_of(folder, "llama")
    assert parts._checked(problem, parts._empty(problem))
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **named: None)
    model = parts._empty(problem)
    for block in model.model.layers:
        block.self_attn.is_causal = False
    with pytest.raises(bilevel.InputError, match="lets a token see the next one"):
        parts._checked(problem, model)


def test_adapters_are_drawn_as_on_a_model_with_numbers(folder):
    problem, drawn = problem_of(folder, "llama"), []
    for model in (problem.fresh_model(0), parts._empty(problem)):
        if model.device.type == "meta":
            attach(model, Files(model, parts._places(model, problem.model)))
        torch.manual_seed(7)
        adapter = bilevel.LoRA(rank=2).prepare(model, ("y", "z"))
        drawn.append((adapter.identity, torch.cat([p.flatten() for p in adapter.parameters()])))
    assert drawn[0][0] == drawn[1][0] and drawn[0][1].equal(drawn[1][1])


def test_other_ties_than_the_config_has_are_refused_by_all(folder):
    told = {(folder / f"told-{rank}.txt").read_text() for rank in range(2)}
    assert len(told) == 1
    assert "hold other parameters than its config.json describes" in told.pop()


class Apart(bilevel.Problem):
    """A class whose module comes as an outline, from a file."""

    def __init__(self, path):
        self.path = path

    def init(self, generator):
        module = torch.nn.Linear(2, 1)
        module.load_state_dict(load_file(self.path))
        return torch.ones(2), module

    def outline(self, generator):
        with torch.device("meta"):
            module = torch.nn.Linear(2, 1)
        module.home = "cpu"
        return torch.ones(2), attach(
            module, Files(module, dict.fromkeys(module.state_dict(), self.path))
        )

    def upper(self, x, y, batch):
        return y(x[None]).square().sum()

    def lower(self, x, y, batch):
        return (y(x[None]) - x.sum()).square().sum()


def test_an_outline_of_ones_own_is_a_start(tmp_path):
    save_file(torch.nn.Linear(2, 1).state_dict(), tmp_path / "y.safetensors")
    problem, launcher = Apart(tmp_path / "y.safetensors"), FSDP2()
    solver = scalebio(warmup=0)
    expected = bilevel.solve(problem, solver, steps=4)
    try:
        found = bilevel.solve(problem, solver, steps=4, launcher=launcher)
    finally:
        launcher.close()
    assert not torch.equal(expected.x, torch.ones(2))
    torch.testing.assert_close(found.x, expected.x)
