"""Optimizers for parameters in half precision: float32 masters, or rounding right on average."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.variable import OptimizerFactory

Precision = Literal["master", "stochastic", "plain"]

LOW = (torch.bfloat16, torch.float16)


def with_precision(
    factory: OptimizerFactory, precision: Precision, generator: torch.Generator
) -> OptimizerFactory:
    """A factory whose optimizers step half-precision parameters in the way of that name.

    The seed of stochastic rounding is drawn from the generator; the others draw nothing.
    """
    if precision == "master":
        return masters(factory)
    if precision == "plain":
        return factory
    return stochastic(factory, seed=int(torch.randint(2**62, (), generator=generator)))


def masters(factory: OptimizerFactory) -> OptimizerFactory:
    """A factory whose optimizers step float32 masters of their half-precision parameters.

        m <- optimizer(m, float32(gradient)),    p <- round(m)

    since p alone loses steps below half its spacing, 2^-9 |p| in bfloat16: of an AdamW step of 1e-5
    on weights of about 0.02 a fifth is left. A master is made when its parameter first steps, and
    lives in `optimizer.state[p]["master"]` among the optimizer's own state of p, which is float32
    too: whoever drops that entry drops all. Where a parameter was overwritten, its master follows,
    entry by entry; entries that still are the rounded master keep all digits.

    A step uses up the gradients: they are converted one by one, so that both precisions never exist
    of all. Float32 and float64 parameters are stepped as by the optimizer alone.

    Reference: Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.1. Deviations: no
    loss scale, which bfloat16 does not need; masters of what trains now only.

    >>> p = torch.full((1,), 2.0, dtype=torch.bfloat16, requires_grad=True)
    >>> optimizer = masters(lambda params: torch.optim.SGD(params, lr=1e-3))([p])
    >>> for _ in range(9):
    ...     p.grad = torch.ones_like(p)
    ...     optimizer.step()
    >>> p.item(), round(optimizer.state[p]["master"].item(), 4)
    (1.9921875, 1.991)
    """

    def widen(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
        master = optimizer.state.get(p, {}).pop("master", None)
        return p.detach().float() if master is None else _follow(master, p)

    def narrow(optimizer: torch.optim.Optimizer, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for p, master in pairs:
            p.copy_(master)
            optimizer.state[p]["master"] = master

    return _in_float32(factory, widen, narrow)


def stochastic(factory: OptimizerFactory, *, seed: int = 0) -> OptimizerFactory:
    """A factory whose optimizers round half-precision parameters up or down at random.

        p <- one of the two neighbors of u = optimizer(float32(p), float32(gradient)), mean u

    No master is kept; the optimizer's own state is float32. The noise of a step is a function of
    the seed and the number of steps so far, which `param_groups` holds, and so does a checkpoint:
    copies with the same seed that step together are rounded alike, which cancels where they are
    compared, and processes that hold the same parameters keep them the same. Float32 and float64
    parameters are stepped as by the optimizer alone. A step uses up the gradients.

    Reference: Gupta et al., Deep Learning with Limited Numerical Precision, ICML 2015, section 3.
    """

    def narrow(optimizer: torch.optim.Optimizer, pairs: list[tuple[Tensor, Tensor]]) -> None:
        group = optimizer.param_groups[0]
        count = group.get("roundings", 0)
        digest = hashlib.sha256(f"{seed}/{count}".encode()).digest()
        begun = vars(optimizer).get(NOISE)
        generators: dict[torch.device, torch.Generator] = {} if begun is None else begun
        for p, exact in pairs:
            if p.device not in generators:
                own = torch.Generator(p.device).manual_seed(int.from_bytes(digest[:7], "big"))
                generators[p.device] = own
            _local(p).copy_(_round(_local(exact), p.dtype, generators[p.device]))
        group["roundings"] = count + (begun is None)

    return _in_float32(factory, lambda optimizer, p: p.detach().float(), narrow)


@contextmanager
def by_parts(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block several calls of `step`, each for some of the parameters, count as one.

    In the order of one step they draw the same noise.
    """
    setattr(optimizer, NOISE, {})
    try:
        yield
    finally:
        delattr(optimizer, NOISE)
        group = optimizer.param_groups[0]
        if "roundings" in group:
            group["roundings"] += 1


NOISE = "_noise_of_this_step"
"""The attribute of an optimizer that holds the generators of a step by parts."""


def _in_float32(
    factory: OptimizerFactory,
    widen: Callable[[torch.optim.Optimizer, Tensor], Tensor],
    narrow: Callable[[torch.optim.Optimizer, list[tuple[Tensor, Tensor]]], None],
) -> OptimizerFactory:
    """A factory of optimizers that step what `widen` makes of a parameter, then call `narrow`."""

    def build(parameters: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = factory(parameters)
        if any(p.dtype in LOW for p in parameters):
            standing = _StandIns()

            @torch.no_grad()
            def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                standing.put(optimizer, widen)

            @torch.no_grad()
            def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                narrow(optimizer, standing.remove(optimizer))

            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)

            def loaded(optimizer: torch.optim.Optimizer) -> None:
                standing.remove(optimizer)

            # Optimizer.load_state_dict casts state to the dtype of what it finds: show it float32
            optimizer.register_load_state_dict_pre_hook(lambda o, _: standing.put(o, None))
            optimizer.register_load_state_dict_post_hook(loaded)
        return optimizer

    return build


class _StandIns:
    """Float32 tensors in the place of parameters, for the time of one step or one load.

    An optimizer's `param_groups` and `state` speak of them within, of the parameters outside.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def put(
        self,
        optimizer: torch.optim.Optimizer,
        widen: Callable[[torch.optim.Optimizer, Tensor], Tensor] | None,
    ) -> None:
        """Replace the half-precision parameters that have a gradient, or all without `widen`."""
        self.remove(optimizer)  # what a step that failed has left
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if p.dtype not in LOW or (widen and p.grad is None):
                    continue
                if widen:
                    stand_in = widen(optimizer, p)
                    stand_in.grad, p.grad = p.grad.float(), None
                else:
                    stand_in = torch.empty(
                        (), dtype=torch.float32, device=p.device
                    )  # for its kind only
                self.pairs.append((p, stand_in))
                group["params"][i] = stand_in
                own = optimizer.state.pop(p, None)
                if own:
                    optimizer.state[stand_in] = {k: _wide(v) for k, v in own.items()}

    def remove(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
        """Put the parameters back; returns the pairs of parameter and what stood for it."""
        pairs, self.pairs = self.pairs, []
        back = {id(stand_in): p for p, stand_in in pairs}
        for group in optimizer.param_groups:
            group["params"][:] = [back.get(id(p), p) for p in group["params"]]
        for p, stand_in in pairs:
            stand_in.grad = None
            own = optimizer.state.pop(stand_in, None)
            if own:
                optimizer.state[p] = own
        return pairs


def _follow(master: Tensor, p: Tensor) -> Tensor:
    """The master, with the entries of p where somebody else has set them."""
    own, now = _local(master), _local(p.detach())
    changed = now != own.to(now.dtype)
    torch.where(changed, now.float(), own, out=own)  # one float32 tensor beside it, not two
    return master


def _wide(value: Any) -> Any:
    """State that an optimizer made when it was built has the parameter's dtype."""
    return value.float() if torch.is_tensor(value) and value.dtype in LOW else value


def _round(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One of the neighbors of float32 numbers in `dtype`, with `exact` as its mean.

    With s the spacing of `dtype` at u and k uniform in [0, 1), floor(u / s + k) s; k has as many
    bits as float32 has more than `dtype`, so the sum is exact and representable numbers stay.
    """
    info = torch.finfo(dtype)
    bits = round(math.log2(info.eps / torch.finfo(torch.float32).eps))
    lowest = math.frexp(info.tiny)[1]  # below it the spacing is even
    exponent = torch.frexp(exact).exponent.clamp_(min=lowest)
    # 2^(exponent - 1) by its bits: torch.ldexp takes a power, which a GPU may round
    spacing = ((exponent + 126) << 23).view(torch.float32) * info.eps
    noise = torch.randint(
        2**bits, exact.shape, dtype=torch.int32, device=exact.device, generator=generator
    )
    rounded = (exact / spacing).add_(noise, alpha=2.0**-bits).floor_().mul_(spacing)
    return rounded.to(dtype)


def _local(tensor: Tensor) -> Tensor:
    """What of a sharded tensor this process holds; the noise is drawn for that."""
    to_local = getattr(tensor, "to_local", None)  # a DTensor, told without importing its package
    return to_local() if to_local else tensor
