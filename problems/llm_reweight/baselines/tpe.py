"""Optuna's tree-structured Parzen estimator on the weights, where Optuna is installed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method, normalized, require


@dataclass(frozen=True, kw_only=True)
class TPE(Method):
    """Short runs whose mixtures are proposed from those before; the best is taken.

    The search is over u_s in (0, 1) with w_s ~ -log u_s: uniform u are even on the simplex. The
    first run is uniform.

    Reference: Bergstra, Bardenet, Bengio, Kegl, Algorithms for Hyper-Parameter Optimization, NIPS
    2011, section 4, as Optuna has it, with its defaults but a third of the runs at random.
    """

    runs: int = 12
    """Short runs, which share the budget evenly."""

    def __post_init__(self) -> None:
        require(self, runs="at least 1")

    def check(self, names: list[str]) -> list[str]:
        if find_spec("optuna"):
            return []
        return ["tpe needs optuna; install it with: pip install 'bilevel[search]'."]

    def search(self, lab: Lab) -> Found:
        import optuna  # pyright: ignore[reportMissingImports]

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=lab.seed, multivariate=False, n_startup_trials=max(2, self.runs // 3)
        )
        study = optuna.create_study(sampler=sampler)
        keys = [f"u{k}" for k in range(len(lab.names))]  # names of sources may be anything
        study.enqueue_trial(dict.fromkeys(keys, 0.5))

        def mixture(values: dict[str, float]) -> dict[str, float]:
            return normalized(lab.names, [-math.log(values[key]) for key in keys])

        def objective(trial: Any) -> float:
            values = {key: trial.suggest_float(key, 1e-6, 1 - 1e-6) for key in keys}
            return lab.trial(mixture(values), lab.budget / self.runs)

        study.optimize(objective, n_trials=self.runs)
        note = f"target loss {study.best_value:.3f}, the best of {self.runs}"
        return Found(weights=mixture(study.best_params), note=note)
