"""Half-precision parameters: nothing of a step is lost, with masters or on average."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard

from bilevel import Variable, checkpoint, optimizer_by_name
from bilevel.descent import set_lr
from bilevel.memory import LISA
from bilevel.precision import _round, masters, stochastic, with_precision
from bilevel.tree import clone, named_leaves

UNFIT = ("Optimizer", "LBFGS", "SparseAdam")
KINDS = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNFIT
]
WRAPS = {"master": masters, "stochastic": stochastic}


def weights(count=1000, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(count, generator=draw)).to(dtype)


def slope(like, step):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(like.shape, generator=draw).to(like.dtype)


def step(variable, number):
    variable.gather([slope(p, number + i) for i, p in enumerate(leaves_of(variable))])
    variable.step()


def leaves_of(variable):
    return list(named_leaves(variable.value).values())


def moved(factory, count):
    """The mean move of weights against the sign of the gradient in one step of AdamW at 1e-5."""
    value = weights(count)
    variable = Variable("y", value.clone(), factory)
    sign = slope(value, 1).sign()
    variable.gather([sign])
    variable.step()
    return -((variable.value.detach().double() - value.double()) * sign).mean() / 1e-5, variable


def test_plain_bfloat16_loses_most_of_a_step_and_these_do_not():
    plain = optimizer_by_name("adamw", 1e-5, weight_decay=0.0)
    count = 200_000
    kept, _ = moved(plain, count)
    assert 0.15 < kept < 0.23  # the mean over normal weights of those that reach half a spacing
    _, variable = moved(masters(plain), count)
    (state,) = variable.optimizer.state.values()
    step = (state["master"].double() - weights(count).double()).abs() / 1e-5
    # the step is lr up to eps of AdamW (1e-8); float32 rounds weights below 0.125 by 2^-28
    torch.testing.assert_close(step, torch.ones_like(step), rtol=0, atol=2**-27 / 1e-5)
    on_average, _ = moved(stochastic(plain), count)
    # an entry moves by its spacing s with chance lr / s: variance below lr s, s <= 2^-7 |weight|
    deviation = (2**-7 * weights(count).double().abs().mean() / 1e-5 / count) ** 0.5
    assert abs(on_average - 1) < 4 * deviation < 0.05


@pytest.mark.parametrize("name", KINDS)
def test_masters_are_what_the_optimizer_makes_of_float32(name):
    kind, value = getattr(torch.optim, name), weights(64).view(8, 8)
    variable = Variable("y", value.clone(), masters(lambda p: kind(p, lr=1e-3)))
    exact = value.float().requires_grad_()
    reference = kind([exact], lr=1e-3)
    for number in range(4):
        step(variable, number)
        exact.grad = slope(value, number).float()
        reference.step()
        state = variable.optimizer.state[variable.value]
        assert torch.equal(state["master"], exact.detach())
        assert torch.equal(variable.value.detach(), exact.detach().bfloat16())
    assert variable.optimizer.param_groups[0]["params"] == [variable.value]
    assert list(variable.optimizer.state) == [variable.value]
    floats = [t for t in state.values() if torch.is_tensor(t) and t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_any_optimizer_steps_both_kinds_of_parameters(name, wrap):
    kind = getattr(torch.optim, name)
    value = {"low": weights(64).view(8, 8), "wide": weights(64, torch.float32).view(8, 8)}
    alone = value["wide"].clone()
    variable = Variable("y", value, WRAPS[wrap](lambda p: kind(p, lr=1e-2)))
    reference = Variable("y", alone, lambda p: kind(p, lr=1e-2))
    before = value["low"].detach().clone()
    for number in range(3):
        step(variable, number)
        step(reference, number + 1)  # the gradient of the second leaf
    assert torch.equal(value["wide"].detach(), alone.detach())
    assert not torch.equal(value["low"].detach(), before)
    assert "master" not in variable.optimizer.state.get(value["wide"], {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrap", WRAPS)
def test_wide_parameters_get_the_very_optimizer(dtype, wrap):
    made = []

    def factory(parameters):
        made.append(torch.optim.Adam(parameters, lr=0.1))
        return made[-1]

    optimizer = WRAPS[wrap](factory)([weights(4, dtype)])
    assert optimizer is made[0]
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("precision", WRAPS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {}), ("adam", {"amsgrad": True}), ("sgd", {"momentum": 0.9}), ("sgd", {})],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, precision, name, options):
    factory = with_precision(
        optimizer_by_name(name, 1e-4, **options), precision, torch.Generator().manual_seed(3)
    )
    straight = Variable("y", {"a": weights(300), "b": weights(7, torch.float32)}, factory)
    for number in range(3):
        step(straight, number)
    saved = checkpoint.save(tmp_path, {"step": 3} | straight.state_dict(), fingerprint={})
    restored = Variable("y", {"a": torch.zeros(300).bfloat16(), "b": torch.zeros(7)}, factory)
    restored.load_state_dict(checkpoint.load(saved, fingerprint={}))
    for number in range(3, 6):
        step(straight, number)
        step(restored, number)
    for one, other in zip(leaves_of(straight), leaves_of(restored), strict=True):
        assert torch.equal(one, other)
        states = straight.optimizer.state.get(one, {}), restored.optimizer.state.get(other, {})
        assert states[0].keys() == states[1].keys()
        for key, kept in states[0].items():
            if torch.is_tensor(kept):
                assert kept.dtype == states[1][key].dtype == torch.float32
                assert torch.equal(kept, states[1][key])


def test_rounding_is_drawn_anew_at_each_step_and_alike_for_twins():
    factory = stochastic(optimizer_by_name("sgd", 1e-5), seed=1)
    one, two = (Variable(n, weights(2000), factory) for n in "yz")
    other = Variable("y", weights(2000), stochastic(optimizer_by_name("sgd", 1e-5), seed=2))
    ups = []
    for _ in range(2):
        for variable in (one, two, other):
            before = variable.value.detach().clone()
            variable.gather([torch.ones_like(before)])
            variable.step()
            ups.append(variable.value.detach() != before)
    assert torch.equal(one.value, two.value)
    assert not torch.equal(one.value, other.value)
    assert not torch.equal(ups[0], ups[3])


def tiny():
    import transformers as tf

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    config = tf.LlamaConfig(
        vocab_size=64, num_attention_heads=2, num_key_value_heads=2, use_cache=False, **size
    )
    return tf.LlamaForCausalLM(config).bfloat16()


@pytest.mark.parametrize("precision", WRAPS)
def test_masters_leave_with_the_blocks_that_leave(precision):
    generator = torch.Generator().manual_seed(0)
    factory = with_precision(optimizer_by_name("adamw", 1e-3), precision, generator)
    y = Variable("y", tiny(), factory)
    z = Variable("z", clone(y.value), factory)
    state = LISA(gamma=1, period=1).init(y.value, generator)
    ids = torch.arange(24).view(2, 12)
    held, drawn = [], set()
    for number in range(8):
        state.before_step(number, [y, z])
        drawn.add(tuple(state.active))
        for variable in (y, z):
            variable.value(input_ids=ids, labels=ids).loss.backward()
            variable.step()
            trains = {p for p in variable.value.parameters() if p.requires_grad}
            assert set(variable.optimizer.state) == trains
            held.append(variable.memory()["optimizer"])
    numbers = sum(p.numel() for p in trains)
    assert len(drawn) > 1
    copies = 3 if precision == "master" else 2  # with both moments, and a step count for each
    assert set(held) == {4 * copies * numbers + 4 * len(trains)}


def test_a_master_follows_who_overwrites_its_parameter():
    value = weights(4)
    variable = Variable("y", value, masters(optimizer_by_name("sgd", 1e-6)))
    step(variable, 0)
    kept = variable.optimizer.state[value]["master"].clone()
    assert not torch.equal(kept, value.float())  # the digits that the parameter lacks
    new = value.detach().clone()
    new[2:] = 0.5
    variable.assign([new])
    variable.gather([torch.zeros_like(value)])
    variable.step()
    expected = torch.cat([kept[:2], torch.full((2,), 0.5)])
    assert torch.equal(variable.optimizer.state[value]["master"], expected)


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_step_size_can_be_set(wrap):
    value = weights(50)
    variable = Variable("y", value, WRAPS[wrap](optimizer_by_name("sgd", 1.0)))
    step(variable, 0)
    before = value.detach().clone()
    set_lr(variable, 0.0)
    step(variable, 1)
    assert torch.equal(value.detach(), before)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_step_or_load_that_fails_leaves_no_stand_ins(wrap, monkeypatch):
    value = weights(5)
    variable = Variable("y", value, WRAPS[wrap](optimizer_by_name("adamw", 1e-2)))
    step(variable, 0)
    saved = variable.optimizer.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "lerp_", lambda *a, **k: 1 / 0)
        patch.setattr(torch, "_foreach_lerp_", lambda *a, **k: 1 / 0)
        variable.gather([torch.full_like(value, torch.inf)])
        with pytest.raises(ZeroDivisionError):
            variable.optimizer.step()
    with pytest.raises(ValueError, match="parameter group"):
        variable.optimizer.load_state_dict(saved | {"param_groups": []})
    before = value.detach().clone()
    step(variable, 2)
    assert not torch.equal(value.detach(), before)
    assert value.isfinite().all()  # of the failed step no gradient is left
    assert list(variable.optimizer.state) == [value]
    assert variable.optimizer.param_groups[0]["params"] == [value]


@pytest.mark.parametrize("wrap", WRAPS)
def test_shards_step_as_the_whole_does(wrap):
    def layer():
        torch.manual_seed(0)
        return torch.nn.Linear(8, 8, dtype=torch.bfloat16)

    factory = WRAPS[wrap](optimizer_by_name("adamw", 1e-4))
    whole = Variable("y", layer(), factory)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = Variable("y", fully_shard(layer()), factory)
        for _ in range(3):
            for variable in (whole, sharded):
                variable.value(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum().backward()
                variable.step()
        for one, other in zip(leaves_of(whole), leaves_of(sharded), strict=True):
            assert torch.equal(one, other.full_tensor())
            for key, kept in whole.optimizer.state[one].items():
                there = sharded.optimizer.state[other][key]
                assert type(there) is (torch.Tensor if key == "step" else type(other.data))
                assert torch.equal(kept, there if key == "step" else there.full_tensor())
    finally:
        dist.destroy_process_group()


@given(
    st.floats(-(2.0**127), 2.0**127, width=32),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_rounding_takes_a_neighbor_and_keeps_what_needs_none(number, dtype, seed):
    exact = torch.full((64,), number)
    near = exact[0].to(dtype)
    if abs(number) > torch.finfo(dtype).max or (number and abs(number) < torch.finfo(dtype).tiny):
        return
    rounded = _round(exact, dtype, torch.Generator().manual_seed(seed))
    away = torch.tensor(float("inf") if number > float(near) else float("-inf"))
    other = (near.view(torch.int16) + (1 if (away > 0) == (number > 0) else -1)).view(dtype)
    allowed = {float(near)} | ({float(other)} if float(near) != number else set())
    assert set(rounded.tolist()) <= allowed
    same = near.float().expand(64).clone()
    assert torch.equal(_round(same, dtype, torch.Generator().manual_seed(seed)), same.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("start", [1.0, -3.0, 0.02])
def test_rounding_is_right_on_average(dtype, part, start):
    low = torch.tensor(start, dtype=dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    gap = float(high) - float(low)
    exact = torch.full((40_000,), float(low) + part * gap)
    share = (float(exact[0]) - float(low)) / gap  # as far as float32 can tell
    rounded = _round(exact, dtype, torch.Generator().manual_seed(0)).double()
    deviation = (share * (1 - share) / len(exact)) ** 0.5
    assert abs(float((rounded - float(low)).mean()) / gap - share) < 4 * deviation


def test_a_number_that_needs_no_rounding_never_moves():
    low = torch.full((2**21,), 0.99609375)  # 255 spacings: noise of 24 bits would be rounded up
    rounded = _round(low, torch.bfloat16, torch.Generator().manual_seed(0))
    assert torch.equal(rounded.float(), low)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 0.0])
def test_rounding_keeps_what_is_not_finite(number):
    exact = torch.full((8,), number)
    rounded = _round(exact, torch.bfloat16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded.float(), exact, equal_nan=True, rtol=0, atol=0)


def test_plain_is_the_optimizer_alone():
    factory = optimizer_by_name("sgd", 0.1)
    assert with_precision(factory, "plain", torch.Generator()) is factory
