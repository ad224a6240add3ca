"""Host memory for what a copy does not work with: other places, the same numbers."""

import pytest
import torch
from test_memory import Tokens

import bilevel
from bilevel.blocks import parameter_groups
from bilevel.descent import finite_norm
from bilevel.errors import NonFiniteError
from bilevel.fsdp import FSDP2
from bilevel.memory import LISA
from bilevel.problems.llm_reweight.rehearsal import _fill
from bilevel.run import main
from bilevel.solve import start
from bilevel.solvers.penalty import Penalty, proximal, scalebio
from bilevel.storage import fake, real
from bilevel.tree import leaves

WAYS = ["idle", "states"]


class Half(Tokens):
    def init(self, generator):
        x, y = super().init(generator)
        return x, y.bfloat16()


def run(problem, offload, *, steps=6, solver=None, **options):
    """The state at the end and the losses on the way."""
    memory = LISA(gamma=1, period=2, offload=offload, **options)
    solver = solver or scalebio(warmup=2, lower_lr=1e-2, clip=1.0)
    state = start(problem, solver, memory=memory)
    losses = []
    for _ in range(steps):
        state = solver.step(problem, bilevel.Single(), state)
        losses.append((state.upper, state.lower))
    return state, losses


def held(state):
    """Everything that a state holds, in an order that does not depend on places."""
    found = []
    for variable in state.variables.values():
        found += [p.detach() for p in leaves(variable.value)]
        own = variable.optimizer.state_dict()["state"]
        found += [t for i in sorted(own) for _, t in sorted(own[i].items())]
    return found


@pytest.mark.parametrize("offload", WAYS)
@pytest.mark.parametrize(
    ("problem", "options"),
    [
        (Tokens, {}),
        (Tokens, {"share": False, "embedding": False}),
        (Half, {"precision": "master"}),
        (Half, {"precision": "stochastic"}),
        (Half, {"precision": "plain", "pool": 2}),
    ],
)
def test_places_change_no_number(problem, options, offload):
    (plain, losses), (moved, found) = (run(problem(), o, **options) for o in ("none", offload))
    assert found == losses
    pairs = list(zip(held(moved), held(plain), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and len(pairs) > 50


@pytest.mark.parametrize("offload", WAYS)
def test_several_inner_steps_and_momentum_change_no_number(offload):
    solver = Penalty(
        stencil=1, growth=1.0, inner_steps=3, warmup=1, momentum=0.5, lower_optimizer="adam"
    )
    (plain, losses), (moved, found) = (
        run(Tokens(), o, steps=4, solver=solver) for o in ("none", offload)
    )
    assert found == losses
    assert all(torch.equal(a, b) for a, b in zip(held(moved), held(plain), strict=True))


class Watched(Tokens):
    """Notes the bytes that are alive when a loss is asked for, on tensors without content."""

    def __init__(self, storage):
        self.storage, self.seen = storage, []
        super().__init__()
        with real():
            self.model = super().init(torch.Generator())[1].to("meta")

    def init(self, generator):
        _fill(self.model)
        return torch.zeros(2, dtype=torch.float64), self.model

    def loss(self, y, start):
        self.seen.append((y, self.storage.live, self.storage.host))
        ids = torch.zeros(2, 12, dtype=torch.long)
        return y(input_ids=ids).logits.float().square().mean()


@pytest.mark.parametrize(
    ("offload", "share"), [("idle", True), ("states", True), ("states", False)]
)
def test_one_copy_is_on_the_device_at_a_time(offload, share):
    with fake() as storage:
        problem = Watched(storage)
        memory = LISA(gamma=2, offload=offload, share=share)
        solver = scalebio(warmup=0)
        state = solver.init(problem, memory, bilevel.Single(), torch.Generator().manual_seed(0))
        launcher = bilevel.Single()
        state = solver.step(problem, launcher, state)  # makes the moments
        problem.seen.clear()
        state = solver.step(problem, launcher, state)
        between, host = storage.live, storage.host
    groups = parameter_groups(problem.model)
    sizes = {n: 4 * p.numel() for n, p in problem.model.named_parameters()}
    ends = [n for part in ("embedding", "head", "norms") for n in groups[part]]
    blocks = groups["blocks"]
    trained = sum(sizes[n] for n in [*ends, *(m for i in state.memory.active for m in blocks[i])])
    drawn = state.memory.drawn if share else range(len(blocks))
    own = sum(sizes[n] for n in [*ends, *(m for i in drawn for m in blocks[i])])
    model, moments = sum(sizes.values()), 2 * trained
    few = 4096  # x and its moments, rotary frequencies, the batch, and the losses in work
    first = {id(y): (live, aside) for y, live, aside in reversed(problem.seen)}
    y, z = (first[id(copy.value)] for copy in state.copies)
    if offload == "idle":  # all of one copy is here, the other waits without a gradient
        assert (y[0], z[0]) == pytest.approx((model + moments,) * 2, abs=few)
        assert y[1] == z[1] == own + moments
        assert (between, host) == (pytest.approx(model + moments, abs=few), own + moments)
    else:  # numbers of one copy are here, all moments are not; between steps neither copy is
        assert (y[0], z[0]) == pytest.approx((model, model), abs=few)
        assert y[1] == z[1] == own + 2 * moments
        assert between == pytest.approx(model - own, abs=few) and host == 2 * (own + moments)


def test_blocks_that_are_drawn_while_a_copy_is_away_go_there_too():
    with fake() as storage:
        problem, memory = Watched(storage), LISA(gamma=1, period=1, offload="states")
        solver, launcher = scalebio(warmup=0), bilevel.Single()
        state = solver.init(problem, memory, launcher, torch.Generator().manual_seed(0))
        problem.seen.clear()
        while len(state.memory.drawn) < 2:
            first = len(problem.seen)
            state = solver.step(problem, launcher, state)
    model = sum(4 * p.numel() for p in problem.model.parameters())
    assert problem.seen[first][1] == pytest.approx(model, abs=4096)  # a block has 10,368 bytes


@pytest.mark.parametrize("offload", WAYS)
def test_what_is_shared_stays_and_what_is_not_moves(offload):
    state, _ = run(Tokens(), offload, steps=3)
    y, z = state.copies
    both = {id(p) for p in leaves(y.value)} & {id(p) for p in leaves(z.value)}
    places = []
    for copy in (y, z, y):
        copy.fetch()
        assert [v.is_here for v in (y, z)] == [copy is y, copy is z]
        places.append({id(p): p.data_ptr() for p in leaves(y.value)})
    for key in places[0]:
        stays = places[0][key] == places[1][key]
        assert stays == (key in both)


@pytest.mark.parametrize("offload", WAYS)
def test_a_run_goes_on_bit_for_bit_and_may_change_its_places(offload, tmp_path):
    def solve(steps, way, **more):
        memory = LISA(gamma=1, period=2, offload=way)
        return bilevel.solve(Half(), scalebio(warmup=1), steps=steps, memory=memory, **more)

    whole = solve(9, "none")
    for steps, way in ((3, offload), (5, "none"), (9, offload)):
        more = {"checkpoints": tmp_path, "checkpoint_every": 1, "resume": True}
        found = solve(steps, way, **more)
    assert found.history == whole.history
    for a, b in zip(found.y.parameters(), whole.y.parameters(), strict=True):
        assert torch.equal(a, b)


def test_y_is_there_for_metrics_callbacks_and_in_the_end():
    there = []

    def callback(state, record):
        there.append(state.variables["y"].is_here)

    for offload in WAYS:
        memory = LISA(gamma=1, offload=offload)
        bilevel.solve(Tokens(), scalebio(), steps=2, memory=memory, callbacks=[callback])
    assert there == [True] * 4


def test_a_gradient_that_is_not_finite_is_explained_at_its_copy():
    state, _ = run(Tokens(), "states", steps=1)
    y, z = state.copies
    y.fetch()
    for p in leaves(z.value):
        p.grad = torch.full_like(p, torch.inf) if p.requires_grad else None

    class Telling(Tokens):
        def explain(self, x, y, batch):
            return f"z is here: {z.is_here}"

    with pytest.raises(NonFiniteError, match="z is here: True"):
        finite_norm(Telling(), state.variables["x"], z, None)


def test_what_cannot_be_kept_apart_is_told_before_the_start():
    def faults(solver, offload="idle", launcher=None):
        memory = LISA(gamma=1, offload=offload)
        return bilevel.check(Tokens(), solver, memory=memory, launcher=launcher)

    assert faults("scalebio") == faults("scalebio_votes", "states") == []
    (fault,) = faults(proximal())
    assert "solver.prox=1.0 (0 is reached)" in fault and "memory.offload=idle" in fault
    assert "solver=VPBGD" in faults("vpbgd")[0]
    assert faults("vpbgd", "none") == []
    assert any(
        "leave it out, or use launcher=single" in f for f in faults("scalebio", "idle", FSDP2())
    )


def test_an_optimizer_that_looks_at_all_parameters_at_once_is_refused():
    memory = LISA(offload="states")
    options = {"lower_optimizer": "prodigy"}
    (fault,) = memory.check(constrained=False, direct=[], options=options)
    assert "solver.lower_optimizer=prodigy" in fault
    assert LISA(offload="idle").check(constrained=False, direct=[], options=options) == []
    assert memory.check(constrained=False, direct=[], options={"lower_optimizer": "AdamW"}) == []


def test_the_command_line_goes_on_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sea", "law", "port"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i} {name}" for i in range(40)))
    words = ["problem=llm_reweight", "problem.sources=sea.txt law.txt", "problem.target=port.txt"]
    words += ["problem.batch=4", "verdict=false", "memory=lisa", "memory.gamma=1"]
    words += ["problem.dtype=bfloat16", "memory.period=2"]
    assert main([*words, "out=whole", "steps=4"]) == 0
    assert main([*words, "out=parts", "steps=2", "memory.offload=states"]) == 0
    assert main([*words, "out=parts", "steps=4", "memory.offload=idle"]) == 0
    one, two = (tmp_path / out / "trajectory.jsonl" for out in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()
    assert main([*words, "out=no", "steps=2", "memory.offload=disk"]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch finds none")
@pytest.mark.parametrize("offload", WAYS)
def test_a_gpu_gets_the_same_numbers_and_keeps_less(offload):
    class There(Tokens):
        def init(self, generator):
            x, y = super().init(generator)
            return x, y.cuda().bfloat16()

        def loss(self, y, start):
            ids = ((torch.arange(24).view(2, 12) * start) % 64).cuda()
            logits = y(input_ids=ids[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            return loss.cpu()

    (_, losses), (moved, found) = (run(There(), o) for o in ("none", offload))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-2, atol=1e-3)
    y, z = moved.copies
    y.fetch()
    away = [p for p in leaves(z.value) if not p.is_cuda]
    assert all(p.is_cuda for p in leaves(y.value))
    assert away and all(p.is_pinned() for p in away)
