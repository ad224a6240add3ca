"""LISA: which blocks train, what is held, and that both copies move alike."""

import pytest
import torch

import bilevel
from bilevel.blocks import parameter_groups
from bilevel.memory import LISA
from bilevel.solve import start
from bilevel.solvers.penalty import Penalty, scalebio


def tiny(kind="llama", tied=False):
    import transformers as tf

    common = {"vocab_size": 64, "use_cache": False, "tie_word_embeddings": tied}
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=4, n_head=2, **common))
    names = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "neox": "GPTNeoX"}
    config = getattr(tf, names[kind] + "Config")(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        **common,
    )
    return getattr(tf, names[kind] + "ForCausalLM")(config)


class Tokens(bilevel.Problem):
    """Weights of two fixed batches for a tiny decoder."""

    def init(self, generator):
        torch.manual_seed(0)
        return torch.zeros(2, dtype=torch.float64), tiny()

    def loss(self, y, start):
        ids = (torch.arange(24).view(2, 12) * start) % 64
        logits = y(input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def lower(self, x, y, batch):
        losses = torch.stack([self.loss(y, 3), self.loss(y, 5)]).double()
        return x.softmax(0) @ losses

    def upper(self, x, y, batch):
        return self.loss(y, 3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "neox", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_groups_partition_the_parameters_of_any_decoder(kind, tied):
    model = tiny(kind, tied)
    groups = parameter_groups(model)
    assert len(groups["blocks"]) == 4
    assert groups["embedding"]
    assert bool(groups["head"]) != tied
    names = [n for part in ("embedding", "head", "norms") for n in groups[part]]
    names += [n for block in groups["blocks"] for n in block]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(bilevel.InputError, match="lists found: none"):
        parameter_groups(torch.nn.Linear(2, 2))


def run(steps, **options):
    sets, bytes_held, moved = [], [], []
    before = {}

    def callback(state, record):
        y, z = state.variables["y"], state.variables["z"]
        sets.append(tuple(state.memory.active))
        bytes_held.append((y.memory()["optimizer"], z.memory()["optimizer"]))
        for variable in (y, z):
            now = {n: p.detach().clone() for n, p in variable.value.named_parameters()}
            if variable.name in before:
                old = before[variable.name]
                changed = {n for n in now if not torch.equal(now[n], old[n])}
                moved.append((state.memory._trainable(), changed))
            before[variable.name] = now

    solver = scalebio(warmup=2)
    memory = LISA(gamma=1, period=2, **options)
    bilevel.solve(Tokens(), solver, steps=steps, memory=memory, callbacks=[callback])
    return sets, bytes_held, moved


def test_only_the_active_set_moves_and_its_state_alone_is_held():
    sets, bytes_held, moved = run(22)
    assert len(set(sets)) > 1
    assert all(a == b for a, b in zip(sets[::2], sets[1::2], strict=True))
    assert {b for pair in bytes_held for b in pair} == {bytes_held[0][0]}
    for allowed, changed in moved:
        assert changed <= allowed
        assert any("layers" in name for name in changed)
        assert "lm_head.weight" in changed


def test_parts_can_be_switched_off():
    _, _, moved = run(4, head=False, embedding=False, norms=False)
    assert all(name.startswith("model.layers.") for _, changed in moved for name in changed)


def test_the_draw_is_saved(tmp_path):
    def weights(*counts, name):
        for steps in counts:
            result = bilevel.solve(
                Tokens(),
                scalebio(warmup=2),
                steps=steps,
                memory=LISA(gamma=2, period=3),
                checkpoints=tmp_path / name,
                checkpoint_every=2,
                resume=True,
            )
        return result

    whole, parts = weights(11, name="whole"), weights(4, 7, 11, name="parts")
    assert torch.equal(whole.x, parts.x)
    pairs = zip(whole.y.parameters(), parts.y.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_wrong_options():
    with pytest.raises(bilevel.InputError) as error:
        LISA(gamma=0, period=0)
    assert len(error.value.faults) == 2
    with pytest.raises(bilevel.InputError, match="at most the number of blocks, 4, got 9"):
        bilevel.solve(Tokens(), "scalebio", steps=1, memory=LISA(gamma=9))


def held(variable):
    """Entries of the leaves that no other variable uses."""
    return variable.memory()["value"] // 4


@pytest.mark.parametrize("solver", ["scalebio", "penalty"])
def test_shared_blocks_change_no_number(solver):
    options = {"lower_lr": 1e-2, "warmup": 2} | ({"growth": 1.1} if solver == "penalty" else {})
    make = {"scalebio": scalebio, "penalty": Penalty}[solver]
    runs = [
        bilevel.solve(Tokens(), make(**options), steps=8, memory=LISA(gamma=1, period=2, share=s))
        for s in (True, False)
    ]
    assert runs[0].history == runs[1].history
    for a, b in zip(runs[0].y.parameters(), runs[1].y.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_twin_holds_only_what_was_drawn():
    sizes = []

    def see(state, record):
        y, z = state.copies
        groups = parameter_groups(y.value)
        leaves = dict(y.value.named_parameters())
        ends = [n for part in ("embedding", "head", "norms") for n in groups[part]]
        own = [*ends, *(n for i in state.memory.drawn for n in groups["blocks"][i])]
        assert held(z) == sum(leaves[n].numel() for n in own)
        assert held(y) == sum(p.numel() for p in leaves.values())
        shared = {id(p) for p in y.value.parameters()} & {id(p) for p in z.value.parameters()}
        assert len(shared) == len(leaves) - len(own)
        sizes.append(len(state.memory.drawn))

    memory = LISA(gamma=1, period=2, pool=2)
    bilevel.solve(Tokens(), scalebio(), steps=12, memory=memory, callbacks=[see])
    assert sizes[0] == 1
    assert sizes[-1] == 2  # of four blocks no more are ever drawn than are in the pool


def test_a_run_with_shared_blocks_goes_on_bit_for_bit(tmp_path):
    options = {"memory": LISA(gamma=1, period=2), "checkpoint_every": 3}
    whole = bilevel.solve(Tokens(), scalebio(warmup=1), steps=9, **options)
    for steps in (3, 9):
        found = bilevel.solve(
            Tokens(), scalebio(warmup=1), steps=steps, checkpoints=tmp_path, resume=True, **options
        )
    assert found.history == whole.history
    for a, b in zip(found.y.parameters(), whole.y.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_constrained_lower_level_shares_nothing():
    class Bounded(Tokens):
        def project_lower(self, y):
            return y

    state = start(Bounded(), scalebio(), memory=LISA(gamma=1))
    assert held(state.copies[1]) == held(state.copies[0])


def test_a_pool_smaller_than_a_draw_is_refused():
    with pytest.raises(bilevel.InputError, match=r"memory\.pool must be 0 or at least"):
        LISA(gamma=3, pool=2)
    with pytest.raises(bilevel.InputError, match=r"memory\.pool must be at most the number of"):
        start(Tokens(), scalebio(), memory=LISA(pool=9))


@pytest.mark.parametrize("ends", [False, True])
def test_tied_parts_are_not_shared_and_stay_tied(ends):
    class Tied(Tokens):
        def init(self, generator):
            x, y = super().init(generator)
            if ends:
                y.lm_head.weight = y.model.embed_tokens.weight
            else:
                y.model.layers[2].mlp.up_proj.weight = y.model.layers[0].mlp.up_proj.weight
            return x, y

    state = start(Tied(), scalebio(), memory=LISA(gamma=1))
    assert held(state.copies[1]) == held(state.copies[0])
    runs = [
        bilevel.solve(Tied(), scalebio(), steps=6, memory=LISA(gamma=1, period=2, share=share))
        for share in (True, False)
    ]
    assert runs[0].history == runs[1].history


@pytest.mark.parametrize("memory", [bilevel.Full(), LISA(gamma=1, period=2)])
@pytest.mark.parametrize(
    "options",
    [{"clip": 0.5, "lower_lr": 1e-2}, {"inner_steps": 3, "momentum": 0.5, "stencil": 3}],
)
def test_copies_that_step_by_turns_move_as_those_that_step_together(memory, options, monkeypatch):
    def solve():
        solver = scalebio(warmup=1, patience=0, **options)
        return bilevel.solve(Tokens(), solver, steps=4, memory=memory)

    turns = solve()
    monkeypatch.setattr(Penalty, "direct", lambda self: ["all copies at once"])
    together = solve()
    assert turns.history == together.history and turns.counts == together.counts
    assert torch.equal(turns.x, together.x)
    for a, b in zip(turns.y.parameters(), together.y.parameters(), strict=True):
        assert torch.equal(a, b)
