"""Bilevel optimization in PyTorch: min_x f(x, y*(x)) subject to y*(x) in argmin_y g(x, y)."""

from bilevel.batch import Batch
from bilevel.check import check
from bilevel.compare import Comparison, compare
from bilevel.errors import InputError
from bilevel.hypergradient import Hypergradient, hypergradient
from bilevel.launch import Launcher, Single
from bilevel.lora import LoRA
from bilevel.memory import LISA, Full, Memory
from bilevel.problem import Always, Functions, Problem, Solution, Stream
from bilevel.resolve import Lower, resolve
from bilevel.result import Result, Status
from bilevel.solve import minimize, solve
from bilevel.solver import Solver, State
from bilevel.variable import Variable, optimizer_by_name
from bilevel.votes import PairwiseVotes

__all__ = [
    "LISA",
    "Always",
    "Batch",
    "Comparison",
    "Full",
    "Functions",
    "Hypergradient",
    "InputError",
    "Launcher",
    "LoRA",
    "Lower",
    "Memory",
    "PairwiseVotes",
    "Problem",
    "Result",
    "Single",
    "Solution",
    "Solver",
    "State",
    "Status",
    "Stream",
    "Variable",
    "check",
    "compare",
    "hypergradient",
    "minimize",
    "optimizer_by_name",
    "resolve",
    "solve",
]
__version__ = "0.1.0.dev0"
