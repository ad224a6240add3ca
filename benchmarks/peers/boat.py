"""boat (package boat-torch): operations composed by name in a dictionary of settings."""

from __future__ import annotations

import os
from typing import Any

import boat_torch
import numpy as np
import torch
from losses import Net, Task, Upper, load  # noqa: F401 - for the worker

torch.set_num_threads(1)

METHODS = {"aid": "implicit", "itd": "unrolled", "meso": "first order"}
LOSSES = {f"{k}_level_loss": {"function": f"{__name__}.{k}"} for k in ("lower", "upper")}


def lower(data: Any, top: Any, net: Any, params: Any = None) -> torch.Tensor:
    return net("lower", top()) if params is None else net("lower", top(), params=params)


def upper(data: Any, top: Any, net: Any, params: Any = None) -> torch.Tensor:
    return net("upper", top()) if params is None else net("upper", top(), params=params)


def settings(net: Any, top: Any, lr: float, upper_lr: float, inner: int) -> dict[str, Any]:
    return {
        "gm_op": ["NGD"],
        "fo_op": None,
        "lower_level_model": net,
        "upper_level_model": top,
        "lower_level_var": list(net.parameters()),
        "upper_level_var": list(top.parameters()),
        "lower_level_opt": torch.optim.SGD(net.parameters(), lr=lr),
        "upper_level_opt": torch.optim.SGD(top.parameters(), lr=upper_lr),
        "lower_iters": inner,
        "device": "cpu",
        "accumulate_grad": False,
        "copy_last_param": True,
        "return_grad": False,
        "fo_ol_batch_input": False,
        "loss_log_path": os.devnull,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
    }


def start(task: Task, method: str, inner: int, products: int) -> Run:
    return Run(task, method, inner, products)


class Run:
    def __init__(self, task: Task, method: str, inner: int, products: int) -> None:
        net, self.top, self.count = Net(task), Upper(task.x0), 0
        config = settings(net, self.top, task.lower_lr, task.upper_lr, inner)
        own: dict[str, dict[str, Any]] = {
            "aid": {"na_op": ["CG"], "CG": {"tolerance": 0.0, "k": products}},
            "itd": {"na_op": ["RAD"]},
            "meso": {
                "na_op": None,
                "gm_op": None,
                "fo_op": "MESO",
                "MESO": {"eta": task.lower_lr / 2, "gamma_1": 1.0, "c0": 0.5, "y_hat_lr": 0.01},
            },
        }
        self.problem = boat_torch.Problem(config | own[method], LOSSES)
        self.problem.build_ll_solver()
        self.problem.build_ul_solver()

    def step(self) -> None:
        self.problem.run_iter({}, {}, self.count)
        self.problem._log_results.clear()  # it keeps every result for ever
        self.count += 1

    def x(self) -> np.ndarray:
        return self.top.x.detach().numpy().copy()


def script(train, labels, valid, valid_labels, lr, steps):  # user: begin
    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(train.new_zeros(len(train)))

        def forward(self):
            return self.x.sigmoid()

    net = torch.nn.Linear(train.shape[1], 10, bias=False, dtype=train.dtype)
    torch.nn.init.zeros_(net.weight)
    weights = Weights()
    config = {
        "gm_op": ["NGD"],
        "na_op": ["CG"],
        "fo_op": None,
        "lower_level_model": net,
        "upper_level_model": weights,
        "lower_level_var": list(net.parameters()),
        "upper_level_var": list(weights.parameters()),
        "lower_level_opt": torch.optim.SGD(net.parameters(), lr=lr),
        "upper_level_opt": torch.optim.SGD(weights.parameters(), lr=300.0),
        "lower_iters": 100,
        "device": "cpu",
        "accumulate_grad": False,
        "copy_last_param": True,
        "return_grad": False,
        "loss_log_path": os.devnull,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
        "CG": {"tolerance": 1e-10, "k": 20},
    }
    losses = {
        "lower_level_loss": {"function": f"{__name__}.user_lower"},
        "upper_level_loss": {"function": f"{__name__}.user_upper"},
    }
    problem = boat_torch.Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()
    for step in range(steps):
        lower_data = {"rows": train, "labels": labels}
        problem.run_iter(lower_data, {"rows": valid, "labels": valid_labels}, step)
    return weights.x.detach()


def user_lower(data, weights, net, params=None):
    out = net(data["rows"]) if params is None else net(data["rows"], params=params)
    losses = torch.nn.functional.cross_entropy(out, data["labels"], reduction="none")
    decay = sum(p.square().sum() for p in (net.parameters() if params is None else params))
    return (weights() * losses).mean() + 0.0025 * decay


def user_upper(data, weights, net, params=None):
    out = net(data["rows"]) if params is None else net(data["rows"], params=params)
    return torch.nn.functional.cross_entropy(out, data["labels"])  # user: end
