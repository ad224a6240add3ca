"""The trunk: passed once for all copies, with the numbers of passes of their own."""

from copy import deepcopy

import pytest
import torch
from test_memory import Tokens, tiny

import bilevel
from bilevel import LISA, InputError
from bilevel.blocks import block_paths
from bilevel.problems.llm_reweight import from_records
from bilevel.problems.llm_reweight.placement import Placement, place
from bilevel.solve import start
from bilevel.solvers.penalty import VPBGD, Penalty, scalebio
from bilevel.trunk import Trunk

TOP = {"gamma": 1, "period": 2, "pool": 2, "pool_from": "top", "embedding": False}


class Rows(Tokens):
    """One batch of rows for the lower loss and another for the upper one, new at every step."""

    def __init__(self, kind="llama", dtype=torch.float32, checkpointing=False):
        self.kind, self.placement = kind, Placement(dtype=dtype, checkpointing=checkpointing)

    def init(self, generator):
        torch.manual_seed(0)
        model = place(tiny(self.kind).eval(), self.placement)  # no dropout
        return torch.zeros(2, dtype=torch.float64), model

    def batches(self, generator):
        return Counted(100), Counted(0)

    def split(self, batch):
        return [batch, batch + 1]

    def lower(self, x, y, batch):
        return x.softmax(0) @ torch.stack([self.loss(y, batch), self.loss(y, batch + 7)]).double()

    def upper(self, x, y, batch):
        return self.loss(y, batch)


class Counted(bilevel.Stream):
    def __init__(self, first):
        self.now = first

    def __next__(self):
        self.now += 3
        return self.now

    def state_dict(self):
        return {"now": self.now}

    def load_state_dict(self, state):
        self.now = state["now"]


class Calls:
    """How often the blocks of all models compute, by depth; a call that only passes on is none."""

    def __init__(self, monkeypatch, *kinds):
        self.count = 0
        for kind in kinds:
            own = type(tiny(kind).get_submodule(block_paths(tiny(kind))[0]))
            monkeypatch.setattr(own, "forward", self.counted(own.forward))

    def counted(self, forward):
        def wrapper(block, *given, **named):
            self.count += 1
            return forward(block, *given, **named)

        return wrapper


def solve(problem, solver=None, *, steps=6, **options):
    memory = LISA(**TOP | options)
    return bilevel.solve(problem, solver or scalebio(warmup=1), steps=steps, memory=memory)


def assert_same(found, expected):
    assert found.history == expected.history
    assert torch.equal(found.x, expected.x)
    for p, q in zip(found.y.parameters(), expected.y.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "neox", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
def test_no_number_changes_and_the_trunk_is_passed_once(kind, share, monkeypatch):
    calls = Calls(monkeypatch, kind)
    options = {"norms": kind != "gpt2", "share": share}  # its positions are embedded apart
    ours, counts = solve(Rows(kind), trunk=True, **options), calls.count
    theirs = solve(Rows(kind), trunk=False, **options)
    assert_same(ours, theirs)
    # a step has 2 passes of f and 2 * 2 of g at y, 2 * 2 of g at z, of which only 2 blocks remain
    assert calls.count - counts == 6 * 10 * 4
    assert counts == 6 * (6 * 4 + 4 * 2)


def test_positions_that_train_keep_copies_apart():
    runs = [solve(Rows("gpt2"), trunk=trunk, steps=3) for trunk in (True, False)]
    assert_same(*runs)  # which has them beside the norms
    memories = [LISA(**TOP | {"embedding": True}), LISA(**TOP | {"pool": 4}), LISA(embedding=False)]
    states = [start(Rows(), scalebio(), memory=memory) for memory in memories]
    assert [state.memory.trunk for state in states] == [None] * 3  # everything may train


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_checkpoints_and_in_half_precision(dtype, checkpointing):
    problem = Rows(dtype=dtype, checkpointing=checkpointing)
    assert_same(solve(problem, trunk=True), solve(problem, trunk=False))


@pytest.mark.parametrize(
    "solver",
    [
        VPBGD(inner_steps=3, rise=3, lower_lr=0.05),
        Penalty(inner_steps=2, warmup=1, growth=1.1, lower_lr=0.05),
        Penalty(inner_steps=2, warmup=1, stencil=3, patience=0, lower_lr=0.05),
    ],
    ids=["vpbgd", "central", "third"],
)
def test_with_other_orders_of_passes(solver, monkeypatch):
    calls = Calls(monkeypatch, "llama")
    ours, counts = solve(Rows(), solver, trunk=True), calls.count
    assert_same(ours, solve(Rows(), solver, trunk=False))
    assert counts < 0.9 * (calls.count - counts)


@pytest.mark.parametrize("offload", ["idle", "states"])
def test_with_the_idle_copy_in_host_memory(offload):
    whole = solve(Rows(), trunk=False)
    assert_same(solve(Rows(), trunk=True, offload=offload), whole)


def test_what_is_kept_is_one_sweep_of_the_copy_that_came_first():
    state = start(Rows(), scalebio(), memory=LISA(**TOP))
    sizes = []
    for _ in range(4):
        state = scalebio().step(Rows(), bilevel.Single(), state)
        sizes.append(state.memory.trunk.bytes)
    row = 2 * 11 * 16 * 4  # [rows, tokens, width] in float32
    assert sizes == [2 * row] * 4  # the passes of f, for which the twin has no use
    vpbgd = VPBGD(inner_steps=3, rise=3)
    state = start(Rows(), vpbgd, memory=LISA(**TOP))
    for _ in range(4):
        state = vpbgd.step(Rows(), bilevel.Single(), state)
        assert state.memory.trunk.bytes == 2 * row


def test_a_run_goes_on_bit_for_bit(tmp_path):
    options = {"memory": LISA(**TOP), "checkpoint_every": 3}
    whole = bilevel.solve(Rows(), scalebio(warmup=1), steps=7, **options)
    for steps in (3, 7):
        found = bilevel.solve(
            Rows(), scalebio(warmup=1), steps=steps, checkpoints=tmp_path, resume=True, **options
        )
    assert_same(found, whole)


def test_a_run_leaves_nothing_at_the_model():
    y = solve(Rows()).y
    assert not y._forward_hooks and not y._forward_pre_hooks
    assert all("forward" not in vars(module) for module in y.modules())


def test_only_drawn_blocks_of_the_top_move_and_the_rest_is_held_once():
    state = start(Rows(), scalebio(), memory=LISA(**TOP))
    before = {n: p.detach().clone() for n, p in state.copies[0].value.named_parameters()}
    for _ in range(12):
        state = scalebio().step(Rows(), bilevel.Single(), state)
    y, z = (copy.value for copy in state.copies)
    moved = {n for n, p in y.named_parameters() if not torch.equal(p, before[n])}
    layers = {int(n.split(".")[2]) for n in moved if ".layers." in n}
    assert layers == {2, 3} and "lm_head.weight" in moved
    assert not any("embed_tokens" in n or ".layers.0." in n or ".layers.1." in n for n in moved)
    own = {n for n, p in z.named_parameters() if p is not dict(y.named_parameters())[n]}
    assert own == moved
    assert state.copies[1].state_dict()["value"].keys() == moved


def test_a_copy_computes_for_itself_where_numbers_could_change(monkeypatch):
    calls = Calls(monkeypatch, "llama")
    ids = torch.arange(12).view(1, 12)
    y, z = (bilevel.Single().variable(n, tiny(), adam()) for n in "yz")
    z.value.load_state_dict(y.value.state_dict())
    trunk = Trunk(2)
    trunk.adopt([y, z])

    def blocks(*models, **more):
        before = calls.count
        for model in models:
            model(input_ids=ids, **more)
        return calls.count - before

    assert blocks(y.value, z.value) == 8  # everything trains
    for name, p in [*y.value.named_parameters(), *z.value.named_parameters()]:
        p.requires_grad_("layers" not in name and "embed" not in name)
    assert blocks(y.value, z.value) == 6
    with torch.no_grad():
        assert blocks(y.value, z.value) == 8  # no pass of a step
    assert blocks(y.value, z.value, output_hidden_states=True) == 6
    assert blocks(y.value, z.value, attention_mask=torch.ones(1, 12)) == 8  # not a whole number
    assert blocks(y.value) == 4
    ids = ids + 1
    assert blocks(z.value) == 4  # other tokens
    assert blocks(deepcopy(y.value)) == 4  # a copy that is none of ours
    assert all("forward" not in vars(module) for module in y.value.modules())
    assert blocks(y.value) == 2
    embedding = y.value.get_input_embeddings().weight.requires_grad_()
    ids = ids + 1
    assert blocks(y.value, z.value) == 8  # it would lose its gradient
    y.value(input_ids=ids).logits.sum().backward()
    assert embedding.grad is not None
    y.value.model.layers[1].self_attn.o_proj.weight.requires_grad_()
    assert blocks(y.value) == 4


def adam():
    return bilevel.optimizer_by_name("adam", 1e-3)


def test_blocks_that_tell_more_than_their_output_are_passed_by_each_copy(monkeypatch):
    calls = Calls(monkeypatch, "llama")
    y, z = (bilevel.Single().variable(n, tiny(), adam()) for n in "yz")
    for p in [*y.value.parameters(), *z.value.parameters()]:
        p.requires_grad_(False)
    trunk = Trunk(2)
    trunk.adopt([y, z])
    for model in (y.value, z.value):
        model.config.use_cache = True  # a cache, which every block writes to
        model(input_ids=torch.arange(6).view(1, 6))
    assert calls.count == 8 and trunk.bytes == 0


def test_an_exception_in_a_pass_leaves_the_blocks_as_they_were():
    model = tiny()
    y, z = (bilevel.Single().variable(n, m, adam()) for n, m in (("y", model), ("z", tiny())))
    for p in model.parameters():
        p.requires_grad_(False)
    trunk = Trunk(2)
    trunk.adopt([y, z])
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    assert all("forward" not in vars(module) for module in model.modules())
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_the_flagship_in_micro_batches():
    texts = {name: [{"text": f"{name} {i} " * 5} for i in range(16)] for name in ("a", "b", "t")}
    options = {"layers": 4, "width": 16, "batch": 8, "target_batch": 4, "max_length": 16}

    def run(micro_batch, trunk):
        problem = from_records(
            {k: texts[k] for k in "ab"}, target=texts["t"], micro_batch=micro_batch, **options
        )
        return solve(problem, trunk=trunk)

    for micro_batch in (0, 3):
        assert_same(run(micro_batch, True), run(micro_batch, False))


def test_wrong_options():
    with pytest.raises(InputError, match=r"memory\.pool_from=top needs the number"):
        LISA(pool_from="top")
