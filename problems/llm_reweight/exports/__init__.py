"""Learned weights as files that trainers take unchanged."""

from bilevel.problems.llm_reweight.exports.export import TOOLS, Export, unknown

__all__ = ["TOOLS", "Export", "unknown"]
