"""Rivals of the learned weights, each by name, within one budget of tokens."""

from bilevel.problems.llm_reweight.baselines.lab import Lab
from bilevel.problems.llm_reweight.baselines.method import Found, Method
from bilevel.problems.llm_reweight.baselines.registry import METHODS, find

__all__ = ["METHODS", "Found", "Lab", "Method", "find"]
