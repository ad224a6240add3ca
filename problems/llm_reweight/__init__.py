"""Learn how much of each training source a language model should be fine-tuned on."""

from bilevel.problems.llm_reweight.problem import LLMReweight, from_records

__all__ = ["LLMReweight", "from_records"]
