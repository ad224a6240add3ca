"""Methods by name, with options: `influence:sharpness=4`."""

from __future__ import annotations

import typing
from dataclasses import fields, replace
from difflib import get_close_matches

from bilevel import InputError
from bilevel.fields import describe, read
from bilevel.problems.llm_reweight.baselines.doremi import DoReMi
from bilevel.problems.llm_reweight.baselines.fed_back import FedBack
from bilevel.problems.llm_reweight.baselines.fixed import Given, Temperature, Uniform
from bilevel.problems.llm_reweight.baselines.influence import Influence
from bilevel.problems.llm_reweight.baselines.less import LESS
from bilevel.problems.llm_reweight.baselines.method import Method
from bilevel.problems.llm_reweight.baselines.mixmin import MixMin
from bilevel.problems.llm_reweight.baselines.random_search import RandomSearch
from bilevel.problems.llm_reweight.baselines.regmix import RegMix
from bilevel.problems.llm_reweight.baselines.rho import RHO
from bilevel.problems.llm_reweight.baselines.sources import LeaveOneOut, Single
from bilevel.problems.llm_reweight.baselines.tpe import TPE
from bilevel.problems.llm_reweight.baselines.twins import Twins

METHODS: dict[str, Method] = {
    "uniform": Uniform(),
    "size": Temperature(power=1.0),
    "temperature": Temperature(),
    "given": Given(),
    "single": Single(),
    "leave_one_out": LeaveOneOut(),
    "random": RandomSearch(),
    "tpe": TPE(),
    "regmix": RegMix(),
    "mixmin": MixMin(),
    "influence": Influence(),
    "influence_sharp": Influence(sharpness=3.0),
    "influence_fed_back": FedBack(),
    "less": LESS(),
    "rho": RHO(),
    "doremi": DoReMi(),
    "scalebio": Twins(solver="scalebio"),
    "learned": Twins(),
}


def find(word: str) -> Method:
    """The method of a word NAME or NAME:KEY=VALUE:KEY=VALUE.

    Raises:
        InputError: If there is no such method or option (the nearest is named), or a value is
            wrong; with every fault.

    >>> find("influence:sharpness=4").sharpness
    4.0
    """
    name, *pairs = word.split(":")
    if name not in METHODS:
        raise InputError(_unknown("method of problem.compare", name, [*METHODS, "all"]))
    method = METHODS[name]
    hints = typing.get_type_hints(type(method))
    known = {field.name: hints[field.name] for field in fields(method)}  # pyright: ignore
    faults, values = [], {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            found = f"{name}:{key}" if equals else f"{name}:{pair}"
            faults.append(_unknown("option", found, [f"{name}:{k}" for k in known]))
            continue
        try:
            values[key] = read(known[key], value)
        except ValueError:
            faults.append(f"{name}:{key} must be {describe(known[key])}, got {value!r}.")
    if faults:
        raise InputError(faults)
    return replace(method, **values)  # pyright: ignore


def _unknown(kind: str, name: str, choices: list[str]) -> str:
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}Choices: {', '.join(choices) or 'it has none'}."
