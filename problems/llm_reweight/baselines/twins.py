"""The bilevel search itself, with the run's solver or another one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from bilevel import Solver, State, plugins
from bilevel.problems.llm_reweight import weighting
from bilevel.problems.llm_reweight.baselines.lab import Lab, search_tokens
from bilevel.problems.llm_reweight.baselines.method import Found, Method
from bilevel.problems.llm_reweight.spread import averaged_weights
from bilevel.solve import solve

CARRIED = ("lower_optimizer", "lower_lr", "penalty")
"""What a solver named here takes over from that of the run: they suit the model."""


@dataclass(frozen=True, kw_only=True)
class Twins(Method):
    """Two copies of the model, one of which also sees the target; see the solver.

    The weights are the mean over the last quarter of the steps, as a run's are.
    """

    solver: str = ""
    """Name of a solver; that of the run without it, or the problem's own."""

    def search(self, lab: Lab) -> Found:
        problem, options = lab.problem, {"seed": lab.seed, "memory": lab.memory}

        def stop(state: State, record: dict[str, Any]) -> None:
            spent = search_tokens(problem, state.counts)
            if spent + spent / state.step > lab.budget:
                raise StopIteration

        result = solve(problem, self._solver(lab), steps=10**9, callbacks=[stop], **options)
        lab.tokens += search_tokens(problem, result.counts)
        weights = weighting.settled(problem, averaged_weights(result.history))
        return Found(weights=weights, note=f"{result.nit} steps")

    def _solver(self, lab: Lab) -> Solver:
        own = lab.solver or plugins.find("solver", lab.problem.default_solver)()
        if not self.solver:
            return own
        named: Solver = plugins.find("solver", self.solver)()
        both = {f.name for f in fields(own)} & {f.name for f in fields(named)} & set(CARRIED)  # pyright: ignore
        return replace(named, **{name: getattr(own, name) for name in both})  # pyright: ignore
