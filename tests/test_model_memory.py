"""What saves memory and where models live: chunks of logits, checkpoints, precision, attention."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import InputError, checkpoint
from bilevel.options import parse
from bilevel.oracle import Oracle
from bilevel.problem import Functions
from bilevel.problems.llm_reweight import LLMReweight, training, verdict
from bilevel.problems.llm_reweight.losses import is_direct, token_losses
from bilevel.problems.llm_reweight.model import load_model, tiny_model
from bilevel.problems.llm_reweight.placement import Placement, place, resolve
from bilevel.run import main
from bilevel.tree import clone

ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def make(kind, *, vocabulary=97, layers=3, **more):
    import transformers as t

    torch.manual_seed(0)
    size = SIZE | {"num_hidden_layers": layers, "vocab_size": vocabulary, "use_cache": False}
    if kind == "gpt2":
        ends = ENDS | {"vocab_size": vocabulary, "n_embd": 32, "n_layer": layers, "n_head": 2}
        return t.GPT2LMHeadModel(t.GPT2Config(**ends, **more)).eval()
    if kind == "opt":
        size = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2}
        ends = ENDS | {"word_embed_proj_dim": 32, "num_hidden_layers": layers}
        return t.OPTForCausalLM(t.OPTConfig(vocab_size=vocabulary, **size, **ends, **more)).eval()
    if kind == "gemma2":
        more |= {"num_key_value_heads": 2, "head_dim": 16}
        return t.Gemma2ForCausalLM(t.Gemma2Config(**size, **ENDS, **more)).eval()
    if kind == "cohere":
        return t.CohereForCausalLM(t.CohereConfig(**size, **ENDS, **more)).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**size, **ENDS, **more)).eval()


def tokens(model, rows=5, length=12):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, length), generator=draw)


def gradients(model, ids, chunk):
    """Losses, and the gradient of a sum with unequal weights, as one vector."""
    model.zero_grad()
    losses = token_losses(model, ids, chunk=chunk)
    (losses * torch.linspace(0.5, 2, losses.numel()).view_as(losses)).sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_near(got, expected):
    """To 1e-6 of the largest entry: sums in another order, 24 bits each, here of 55 terms."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


class Live(TorchDispatchMode):
    """Counts the bytes of storages made within it, and the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.now -= size


def peak(function):
    with Live() as live:
        function()
    return live.peak


def saved_bytes(model, ids, chunk=0):
    """Bytes that a pass keeps for backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_losses(model, ids, chunk=chunk).sum()
    loss.backward()
    return sum(found.values())


@pytest.mark.parametrize("chunk", [1, 7, 54])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_chunks_change_neither_losses_nor_gradients(kind, chunk):
    more = {"tie_word_embeddings": True} if kind == "tied" else {}
    model = make(kind, **more)
    ids = tokens(model)
    expected, slopes = gradients(model, ids, 10**6)
    logits = model(input_ids=ids[:, :-1]).logits.double()
    plain = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(expected.double(), plain, rtol=1e-6, atol=1e-6)
    assert is_direct(model)
    losses, found = gradients(model, ids, chunk)
    assert_near(losses, expected)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert_near(found[name], slope)
    assert "forward" not in vars(model.get_output_embeddings())


def test_logits_exist_for_one_chunk_only():
    model = make("llama", vocabulary=32768, layers=2)
    ids = tokens(model, rows=4, length=65)
    logits = 4 * 64 * 32768 * 4  # bytes of all of them in float32
    weights = 2 * 32768 * 32 * 4  # gradients of both ends
    whole = peak(lambda: token_losses(model, ids, chunk=256).sum().backward())
    model.zero_grad()
    chunked = peak(lambda: token_losses(model, ids, chunk=16).sum().backward())
    assert whole > 2 * logits  # the logarithms that backward needs, and the gradient
    assert chunked < 4 * logits / 16 + 2 * weights


def test_without_a_number_small_logits_are_whole_and_large_ones_in_chunks():
    model = make("llama", vocabulary=32768, layers=1)
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[-1]))
    token_losses(model, tokens(model, rows=2, length=513))  # 1,024 tokens: 2**25 logits
    with torch.no_grad():
        token_losses(model, tokens(model, rows=2, length=515))
    assert seen[0] == 32768 and seen[-1] == 1


def test_chunks_can_be_differentiated_twice():
    model = make("llama", layers=1).double()
    ids = tokens(model)
    found = []
    for chunk in (10**6, 7):
        weight = model.lm_head.weight
        loss = token_losses(model, ids, chunk=chunk).sum()
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(model.parameters())))
    for one, other in zip(*found, strict=True):
        assert_near(other, one)


@pytest.mark.parametrize(
    ("kind", "more"), [("gemma2", {"final_logit_softcapping": 30.0}), ("cohere", {})]
)
def test_logits_changed_after_the_head_are_never_cut(kind, more):
    model = make(kind, **more)
    ids = tokens(model)
    assert not is_direct(model)
    with torch.no_grad():
        assert torch.equal(token_losses(model, ids, chunk=7), token_losses(model, ids, chunk=999))


def test_a_model_without_capping_may_be_cut():
    assert is_direct(make("gemma2", final_logit_softcapping=None))


def test_the_head_is_called_once_a_pass_when_sharded():
    model = make("llama", tie_word_embeddings=False)
    ids = tokens(model)
    expected, slopes = gradients(model, ids, 10**6)
    model.zero_grad()
    calls = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for part in (*model.model.layers, model.model.embed_tokens, model.lm_head, model):
            fully_shard(part)
        token_losses(model, ids, chunk=7).sum().backward()  # after the first, which sets up
        model.lm_head.register_forward_pre_hook(lambda module, given: calls.append(1))
        losses, found = gradients(model, ids, 7)
    finally:
        dist.destroy_process_group()
    assert_near(losses, expected)
    for name, slope in slopes.items():
        assert_near(found[name].full_tensor(), slope)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ],
)
def test_checkpointing_keeps_less_and_changes_nothing(kind, dropout):
    plain = make(kind, layers=6, **dropout)
    checked = place(clone(plain), Placement(checkpointing=True))
    ids = tokens(plain)
    expected, slopes = gradients(plain, ids, 0)
    for _ in range(2):
        losses, found = gradients(checked, ids, 0)
        assert torch.equal(losses, expected)
        assert all(torch.equal(found[n], slopes[n]) for n in slopes)
    assert saved_bytes(checked, ids) < saved_bytes(plain, ids) / 3


def test_checkpoints_stop_where_nothing_below_trains():
    model = place(make("llama", layers=4), Placement(checkpointing=True))
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_()
    calls = {i: 0 for i in range(4)}
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    token_losses(model, tokens(model)).sum().backward()
    assert model.model.layers[2].mlp.up_proj.weight.grad is not None
    assert calls == {0: 1, 1: 1, 2: 2, 3: 2}


def test_a_checkpointed_model_has_the_second_derivatives_of_any_other():
    plain = make("llama", layers=2)
    models, ids = [plain, place(clone(plain), Placement(checkpointing=True))], tokens(plain)
    generator, x = torch.Generator().manual_seed(0), torch.ones(1)
    v = [torch.randn(p.shape, generator=generator) for p in plain.parameters()]

    def loss(x, y):
        return (x * token_losses(y, ids).mean()).sum()

    found = []
    for model in models:
        bend = Oracle(Functions(loss, loss, x, model), {}).curvature(x, model, None)
        found.append([*bend.hvp(v), *bend.cross(v), *bend.push([x])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sum(float(t.abs().sum()) for t in found[0]) > 0


def test_attention_without_second_derivatives_is_told():
    model, x = make("llama", layers=1), torch.ones(1)
    model.config._attn_implementation_internal = "flash_attention_2"
    problem = Functions(lambda x, y: x.sum(), lambda x, y: x.sum(), x, model)
    with pytest.raises(InputError, match=r"flash_attention_2, has no second derivatives; use"):
        Oracle(problem, {}).curvature(x, model, None)


def test_a_twin_of_a_checkpointed_model_is_checkpointed():
    model = place(make("llama"), Placement(checkpointing=True))
    ids = tokens(model)
    assert saved_bytes(clone(model), ids) == saved_bytes(model, ids)


@pytest.mark.parametrize(
    ("gpu", "half", "options", "expected"),
    [
        (False, False, {}, ("cpu", torch.float32)),
        (False, False, {"dtype": "bfloat16"}, ("cpu", torch.bfloat16)),
        (True, True, {}, ("cuda", torch.bfloat16)),
        (True, False, {}, ("cuda", torch.float32)),
        (True, True, {"dtype": "float32"}, ("cuda", torch.float32)),
        (True, True, {"device": "cpu"}, ("cpu", torch.float32)),
    ],
)
def test_auto_takes_what_is_there(monkeypatch, gpu, half, options, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # torch says yes of every card where emulation counts, which is slower than float32
    emulated = lambda including_emulation=True: half or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    found = resolve(**options)
    assert (found.device, found.dtype) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["solver=scalebio"], torch.bfloat16),
        (["solver=vpbgd"], torch.bfloat16),
        (["solver=darts"], torch.float32),
        (["solver=aid"], torch.float32),
        (["solver=aid", "problem.dtype=bfloat16"], torch.bfloat16),
        (["solver=scalebio", "problem.dtype=float32"], torch.float32),
    ],
)
def test_auto_is_float32_for_solvers_that_compare_close_models(monkeypatch, words, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    options = parse(["problem=llm_reweight", *words])
    assert options.problem.placement.dtype == expected


def test_what_is_not_there_is_told_at_once_and_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        resolve(device="cuda", attention="flash_attention_2", dtype="float32")
    first, second = caught.value.faults
    assert "problem.device=cuda" in first
    assert "flash-attn" in second and "problem.dtype=bfloat16" in second
    assert LLMReweight(device="cuda", loss_chunk=-1).check()[0].startswith("problem.loss_chunk")
    assert any("problem.device=cuda" in fault for fault in LLMReweight(device="cuda").check())


def test_attention_is_what_was_asked_for():
    for name in ("sdpa", "eager"):
        model = place(make("llama"), Placement(attention=name))
        assert model.config._attn_implementation == name
    ids = tokens(model)
    sdpa = place(clone(model), Placement(attention="sdpa"))
    torch.testing.assert_close(token_losses(model, ids), token_losses(sdpa, ids))


def test_attention_that_a_model_has_not_is_refused():
    class Odd(torch.nn.Linear):
        def set_attn_implementation(self, name):
            raise ValueError("no such attention")

    with pytest.raises(InputError, match=r"problem\.attention=eager cannot be used with Odd"):
        place(Odd(1, 1), Placement(attention="eager"))


def test_positions_are_not_rounded_with_the_weights():
    """The rotary frequencies are no parameters: rounded, they would turn far tokens elsewhere."""
    wide = tiny_model(64, layers=2, width=64, seed=0)
    low = tiny_model(64, layers=2, width=64, seed=0, placement=Placement(dtype=torch.bfloat16))
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    buffers = dict(wide.named_buffers())
    assert buffers
    for name, b in low.named_buffers():
        assert torch.equal(b, buffers[name]) and b.dtype == buffers[name].dtype


def test_bfloat16_gives_float32_losses_near_those_of_float32():
    exact = tiny_model(97, layers=2, width=32, seed=0)
    half = tiny_model(97, layers=2, width=32, seed=0, placement=Placement(dtype=torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = torch.arange(24).view(2, 12)
    losses = token_losses(half, ids)
    assert losses.dtype == torch.float32
    # weights and activations rounded to 8 bits: logits of size 0.2 off by a few thousandths
    torch.testing.assert_close(losses, token_losses(exact, ids), rtol=0, atol=0.02)
    assert token_losses(half, ids, chunk=5).dtype == torch.float32


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, with two sources, a target and a saved tokenizer."""
    from bilevel.problems.llm_reweight.model import tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    texts = {n: [f"{n} {i} {n}" for i in range(40)] for n in ("sea", "law", "port")}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    tokenizer = tiny_tokenizer([line for lines in texts.values() for line in lines])
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path, len(tokenizer)


def run(*more):
    base = ["problem=llm_reweight", "problem.sources=sea.txt law.txt", "problem.target=port.txt"]
    base += ["problem.batch=4", "verdict=false"]
    base += [] if any(word.startswith("out=") for word in more) else ["out=out"]
    return main([*base, *more])


@pytest.mark.parametrize(
    "more",
    [
        ["problem.dtype=bfloat16"],
        ["problem.checkpointing=true", "problem.loss_chunk=9", "problem.attention=eager"],
        ["problem.checkpointing=true", "memory=lisa", "memory.gamma=1", "memory.embedding=false"],
    ],
)
def test_options_run_from_the_command_line(work, more):
    assert run("steps=3", *more) == 0


def test_chunks_asked_of_a_model_that_caps_are_refused(work, capfd):
    _, vocabulary = work
    make("gemma2", vocabulary=vocabulary, final_logit_softcapping=30.0).save_pretrained("model")
    assert run("problem.model=model", "problem.loss_chunk=8", "steps=2") == 2
    assert "changes the logits after its head" in capfd.readouterr().err
    assert run("problem.model=model", "steps=2") == 0
    capfd.readouterr()


def test_resume_may_change_memory_but_not_precision(work, capfd):
    assert run("steps=2") == 0
    assert run("steps=4", "problem.checkpointing=true", "problem.loss_chunk=9") == 0
    assert run("steps=6", "problem.dtype=bfloat16") == 2
    assert "dtype" in capfd.readouterr().err


def test_a_saved_model_is_loaded_as_asked(work):
    _, vocabulary = work
    make("llama", vocabulary=vocabulary).save_pretrained("model")
    half = Placement(dtype=torch.bfloat16, attention="eager", checkpointing=True)
    model = load_model("model", vocabulary=vocabulary, placement=half)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("memory", ["full", "lisa"])
@pytest.mark.parametrize("precision", ["master", "stochastic"])
def test_half_precision_resumes_bit_for_bit(work, memory, precision):
    words = ["problem.dtype=bfloat16", f"memory={memory}", f"memory.precision={precision}"]
    words += ["memory.gamma=1", "memory.period=3"] if memory == "lisa" else []
    assert run(*words, "steps=2", "out=parts") == 0
    assert run(*words, "steps=4", "out=parts") == 0
    assert run(*words, "steps=4", "out=whole") == 0
    files = [checkpoint.latest(work[0] / out / "checkpoints") for out in ("parts", "whole")]
    one, two = ((f / "tensors.safetensors").read_bytes() for f in files)
    assert one == two
    kept = b'["master", {"tensor"' in (files[0] / "state.json").read_bytes()
    assert kept == (precision == "master")


def test_the_verdict_trains_half_precision_as_it_trains_float32(work):
    size = 1e-4  # of which bfloat16 alone loses most
    (work[0] / "near.txt").write_text("\n\n".join(f"sea {i} sea sea" for i in range(40)))
    files = {"sources": ("sea.txt", "law.txt"), "target": "near.txt"}
    falls = []
    for dtype in ("float32", "bfloat16"):
        problem = LLMReweight(**files, dtype=dtype, batch=8, verdict_steps=30, verdict_lr=size)
        before = training.evaluate(problem.fresh_model(1000), problem.targets[0].test)
        after = verdict.train(problem, {"sea": 0.5, "law": 0.5}, seed=0)
        falls.append(before - after)
    assert falls[0] > 0.02
    # parameters rounded to 8 bits in the forward pass, not steps lost
    assert abs(falls[1] / falls[0] - 1) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["scalebio_votes", "proximal", "vpbgd", "recursive_penalty"])
def test_a_run_on_a_gpu_resumes(work, solver):
    words = [f"solver={solver}", "problem.loss_chunk=9", "problem.checkpointing=true"]
    torch.cuda.reset_peak_memory_stats()
    assert run(*words, "steps=2") == 0
    assert run(*words, "steps=4") == 0
    assert torch.cuda.max_memory_allocated() > 0
