"""The data-weighting problem: softmax weights of sources above, a language model below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bilevel import InputError, Launcher, Memory, Problem, Solver, Stream, processes
from bilevel.cards import Card
from bilevel.footprint import Footprint, Work
from bilevel.problems.llm_reweight import (
    building,
    checks,
    fingerprint,
    footprint,
    not_finite,
    parts,
    paths,
    progress,
    rehearsal,
)
from bilevel.problems.llm_reweight import data as data_module
from bilevel.problems.llm_reweight import exports as exports_module
from bilevel.problems.llm_reweight import per_example as per_example_module
from bilevel.problems.llm_reweight import placement as placement_module
from bilevel.problems.llm_reweight import targets as targets_module
from bilevel.problems.llm_reweight import templates as templates_module
from bilevel.problems.llm_reweight import tokenized as tokenized_module
from bilevel.problems.llm_reweight import weighting as weighting_module
from bilevel.problems.llm_reweight.ledger import Ledger
from bilevel.problems.llm_reweight.model import example_losses
from bilevel.problems.llm_reweight.tokens import Batch, Rows, Stratified, cut, every


@dataclass(frozen=True, kw_only=True)
class LLMReweight(Problem):
    """g = sum_s softmax(x)_s l_s(y) over the sources, f = l_target(y), l = mean loss per example.

    Of several targets l_target is the sum of their losses by their weights, `targets.Target`. x are
    the logits of the source weights, in float64 so that differences of nearly equal losses
    keep their digits; y is a causal language model. `weighting.Weighting` has what groups, bounds
    and a prior make of x, `per_example.Members` what one weight for each example is.

    Reference: Pan et al., ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting, ACL
    2025. Deviation: every batch holds the same number of rows of every source.
    """

    default_solver: ClassVar[str] = "scalebio_votes"
    probed: ClassVar[bool] = False  # the model is loaded once, and its losses are ours
    default_steps: ClassVar[int] = 300

    sources: tuple[str, ...] | Mapping = ()
    """Files of training data, as 'name=path' or 'path'; none means the embedded demonstration. From
    Python also a mapping of names to records, see `from_records`."""
    target: str | tuple[str, ...] | Mapping | Sequence = ""
    """File of examples of what the model should become good at; or several, as 'name=path'."""
    target_weight: tuple[str, ...] = ()
    """How much each of several targets counts, as 'math=2 code=1'; 1 for those not named."""
    test: str | tuple[str, ...] | Mapping | Sequence = ""
    """File to measure the verdict on; without it a quarter of the target is held out. For several
    targets 'name=path', with their names."""
    model: str = "tiny"
    """'tiny' (made here), a local folder, or a hub name."""
    layers: int = 2
    """Blocks of the tiny model."""
    width: int = 64
    """Width of the tiny model."""
    max_length: int = 64
    """Longest row in tokens."""
    batch: int = 24
    """Training rows of a step, shared evenly among the sources."""
    target_batch: int = 6
    """Target rows of a step, shared out among several targets by their weights."""
    micro_batch: int = 0
    """Rows of one forward pass; 0 takes the whole batch. Changes memory, not the result."""
    dtype: placement_module.Dtype = "auto"
    """Of the model's parameters; auto is bfloat16 on a GPU that computes in it, under a solver of
    the penalty family, else float32."""
    device: placement_module.Device = "auto"
    """Where the model lives; auto takes a GPU if there is one."""
    attention: placement_module.Attention = "auto"
    """auto takes flash_attention_2 where it works, else what the model does by itself."""
    checkpointing: bool = False
    """Compute each block again in the backward pass: less memory, up to a third slower."""
    loss_chunk: int = 0
    """Tokens whose logits exist at once; 0 takes as many as have 2**25 logits."""
    weigh: Literal["auto", "sources", "groups", "examples"] = "auto"
    """What has a weight of its own; auto: groups where there are groups, else sources."""
    groups: tuple[str, ...] = ()
    """Sources that share one weight, as 'math=gsm8k,aqua'; the others have their own."""
    group_share: Literal["size", "even"] = "size"
    """How a group's weight is shared among its sources: by their records, or evenly."""
    prior: tuple[str, ...] = ()
    """Weights at the start: 'size', or 'name=weight' for every source or group; none is even."""
    prior_strength: float = 0.0
    """Pull to the prior: f gets this times KL(weights || prior), in nats; 0 only starts there."""
    min_weight: tuple[str, ...] = ()
    """Floors: a number for every source or group, 'name=number' for one."""
    max_weight: tuple[str, ...] = ()
    """Ceilings, written as the floors."""
    max_epochs: float = 0.0
    """Most epochs of any source in a training of `train_examples`, a ceiling; 0 has none."""
    train_examples: int = 0
    """Steps times batch of the training that the weights are for; 0: as many as the records."""
    max_sources: int = 0
    """Most sources or groups with weight; 0 is no limit."""
    allow_overlap: bool = False
    """Go on although target records also stand in a source."""
    columns: tuple[str, ...] = ()
    """Names of keys that files have instead of a format's, as 'prompt=q' or 'source.prompt=q'."""
    template: templates_module.Name = "auto"
    """How prompts and answers are written: auto writes conversations with the tokenizer's own chat
    template (the tiny model's is chatml) and other records as plain text; any other name is a
    template for all of them."""
    use_chosen: bool = False
    """Train on the chosen answers of preference sets."""
    train_on_prompt: bool = False
    """Train on all tokens instead of the answers only."""
    last_turn_only: bool = False
    """Train on the last answer of a conversation only."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What to do with records that cannot be used: stop, or leave them out and count them."""
    held_megabytes: int = 64
    """Size up to which a file is held in memory; JSON Lines above it are read as they are drawn."""
    verdict: bool = True
    """Whether to train fresh models with the learned mixture and with uniform, and compare."""
    verdict_steps: int = 200
    """Training steps of each fresh model."""
    verdict_seeds: int = 3
    """Paired seeds of the comparison."""
    verdict_lr: float = 3e-3
    """Step size of AdamW in these trainings; suits the tiny model, a pretrained one needs less."""
    transfer: str = ""
    """Another model to judge the weights on: LAYERSxWIDTH of a tiny one, as 4x128, or a folder."""
    compare: tuple[str, ...] = ()
    """Methods to hold the learned weights against, such as size,mixmin,influence; or all."""
    compare_tokens: int = 0
    """Tokens that each of their searches may use; 0 takes what learning the weights used."""
    export: tuple[str, ...] = ()
    """Tools to write the weights for at the end, such as 'trl,hf'; all are in bilevel.export."""
    data_seed: int = 0
    """Of the order of the rows."""

    @cached_property
    def data(self) -> data_module.Data:
        """All input, read and checked."""
        return data_module.read(self)

    @cached_property
    def placement(self) -> placement_module.Placement:
        """How models compute on this machine."""
        return placement_module.resolve(
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            checkpointing=self.checkpointing,
        )

    @cached_property
    def style(self) -> templates_module.Style:
        """How records are written."""
        return building.style(self)

    @cached_property
    def tokenizer(self) -> Any:
        return building.tokenizer(self)

    @cached_property
    def tokenized(self) -> tokenized_module.Tokenized:
        """All data as rows."""
        return tokenized_module.read(self)

    @property
    def rows(self) -> list[Rows]:
        """The rows of the sources, in the order of the weights."""
        return self.tokenized.sources

    @property
    def targets(self) -> list[targets_module.Target]:
        """The rows of the targets and their test sets."""
        return self.tokenized.targets

    @cached_property
    def ledger(self) -> Ledger:
        """What the sweeps of a step have seen of each source."""
        return Ledger()

    @cached_property
    def weighting(self) -> weighting_module.Weighting:
        """What the options make of the logits of sources or groups."""
        return weighting_module.weighting(self)

    @cached_property
    def members(self) -> per_example_module.Members:
        """The records that have weights of their own."""
        return per_example_module.members(self.rows)

    @cached_property
    def drawn(self) -> list[Stream]:
        """The streams of training rows that were made, to count which examples were seen."""
        return []

    @cached_property
    def target_weights(self) -> dict[str, float]:
        """The weight of each target; they add up to 1."""
        return targets_module.weights(self)

    @cached_property
    def target_ledger(self) -> Ledger:
        """What the sweeps of a step have seen of each of several targets."""
        return Ledger()

    @property
    def names(self) -> list[str]:
        return list(self.data.sources)

    def check(self) -> list[str]:
        return checks.option_faults(self)

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint.of(self)

    def prepare(self) -> list[str]:
        """Tokenize everything; returns what was found, in lines for the user."""
        if faults := tokenized_module.faults(self):
            raise InputError(faults)
        return [*self.data.notes, *tokenized_module.lines(self)]

    def init(self, generator: torch.Generator) -> tuple[Tensor, nn.Module]:
        seed = int(torch.randint(2**31, (), generator=generator))
        return self._logits(), self.fresh_model(seed, by_engine=processes.expected() > 1)

    def outline(self, generator: torch.Generator) -> tuple[Tensor, nn.Module]:
        seed = int(torch.randint(2**31, (), generator=generator))
        return self._logits(), parts.outline(self, seed)

    def _logits(self) -> Tensor:
        """The start of x."""
        each = self.weigh == "examples"
        plain = weighting_module.is_plain(self)
        size = len(self.members) if each else len(self.names)
        x = torch.zeros(size, dtype=torch.float64)
        return x if each or plain else self.weighting.start()

    def fresh_model(self, seed: int, *, by_engine: bool = False) -> nn.Module:
        """A model as every run starts from it; the seed matters for `tiny` only.

        Args:
            seed: Of random weights.
            by_engine: Whether it stays on the CPU, for an engine to move its shards.
        """
        return building.model(self, seed, by_engine=by_engine)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[rows], the loss of each row."""
        return example_losses(model, batch, chunk=self.loss_chunk)

    def batches(self, generator: torch.Generator) -> tuple[Stream, Stream]:
        seed = int(torch.randint(2**31, (), generator=generator)) ^ self.data_seed
        upper = targets_module.stream(self.targets, rows=self.target_batch, seed=seed)
        if self.weigh == "examples":
            pool = per_example_module.Pooled(self.rows, self.members, rows=self.batch, seed=seed)
            self.drawn.append(pool)
            return upper, pool
        per_source = self.batch // len(self.rows)
        return upper, Stratified(self.rows, rows=[per_source] * len(self.rows), seed=seed)

    def split(self, batch: Batch) -> Sequence[Batch]:
        return cut(batch, self.micro_batch) if self.micro_batch else (batch,)

    def share(self, batch: Batch, index: int, count: int) -> Batch:
        if len(batch.ids) % count:
            raise InputError(
                f"a batch has {len(batch.ids)} rows, which {count} processes cannot share out "
                "evenly; is there less of the target than problem.target_batch?"
            )
        return every(batch, index, count)

    def check_share(self, count: int) -> list[str]:
        return checks.share_faults(self, count)

    def lower(self, x: Tensor, y: nn.Module, batch: Batch) -> Tensor:
        losses = self.losses(y, batch).double()
        if self.weigh == "examples":
            weights = per_example_module.weights_of(x, batch)
            self.ledger.add(y, replace(batch, source=self.members.source[batch.source]), losses)
        else:
            weights = self.source_weights(x)[batch.source] * batch.share
            self.ledger.add(y, batch, losses)
        return (weights * losses.to(x.device)).sum()

    def upper(self, x: Tensor, y: nn.Module, batch: Batch) -> Tensor:
        losses = self.losses(y, batch).double().cpu()
        if len(self.target_weights) > 1:
            self.target_ledger.add(y, batch, losses)
        loss = (batch.share * losses).sum()
        if self.prior_strength:  # the shares of a whole batch add up to 1
            loss = loss + batch.share.sum() * self.weighting.pull(x)
        return loss

    def source_weights(self, x: Tensor) -> Tensor:
        """[sources], float64, differentiable in the logits of sources or groups."""
        return x.softmax(0) if weighting_module.is_plain(self) else self.weighting.weights(x)

    def project_upper(self, x: Tensor) -> Tensor:
        """The logits of the weights within the bounds that are nearest in relative entropy."""
        free = self.weigh == "examples" or weighting_module.is_plain(self)
        return x if free else self.weighting.project(x)

    def metrics(self, x: Tensor, y: nn.Module) -> dict[str, Any]:
        losses = dict(zip(self.names, self.ledger.take(y, len(self.names)), strict=True))
        told: dict[str, Any] = {"losses": losses}
        if len(self.target_weights) > 1:
            seen = self.target_ledger.take(y, len(self.target_weights))
            told["targets"] = dict(zip(self.target_weights, seen, strict=True))
        if self.weigh == "examples":
            return self.members.summary(x, self.names) | told
        weights = self.source_weights(x.detach()).tolist()
        named: dict[str, Any] = {"weights": dict(zip(self.names, weights, strict=True))}
        groups = {"groups": self.weighting.groups(x)} if self.groups else {}
        return named | groups | told

    def solver_wishes(self) -> dict[str, Any]:
        # votes compares every pair at every step; examples are many, and each is drawn rarely
        each = {"upper_optimizer": "adam", "upper_lr": 0.01}
        return each if self.weigh == "examples" else {}

    def precise(self) -> LLMReweight:
        # of 8 bits by darts a small Llama's gradient of x was a third of that in float32
        return replace(self, dtype="float32") if self.dtype == "auto" else self

    def explain(self, x: Tensor, y: nn.Module, batch: Batch) -> str:
        return not_finite.sentence(self.losses, y, batch)

    def on(self, card: Card) -> LLMReweight:
        return footprint.on(self, card)

    def unread(self) -> LLMReweight:
        return replace(self, sources=(), target="", test="", target_weight=())

    def number(self, memory: Memory) -> torch.dtype:
        return footprint.number(self, memory)

    def shared(self, devices: int, given: Set[str]) -> tuple[LLMReweight, tuple[str, ...]]:
        return footprint.shared(self, devices, given)

    def footprint(
        self, work: Work, memory: Memory, launcher: Launcher, devices: int, steps: int
    ) -> Footprint:
        return footprint.footprint(self, work, memory, launcher, devices, steps)

    def measured(self, solver: Solver, memory: Memory) -> tuple[float, float]:
        return rehearsal.measured(self, solver, memory)

    def timed(self, solver: Solver, memory: Memory) -> tuple[float, float]:
        return rehearsal.timed(self, solver, memory)

    def rooted(self) -> LLMReweight:
        return paths.rooted(self)

    def headline(self, record: dict[str, Any]) -> str:
        return progress.headline(record)

    def exporter(self) -> exports_module.Export:
        return exports_module.Export()

    def interim(self, result: Any, out: Path) -> None:
        from bilevel.problems.llm_reweight import output

        output.interim(self, result, out)

    def finish(self, result: Any, out: Path) -> list[str]:
        from bilevel.problems.llm_reweight import output

        return output.write(self, result, out)


def from_records(
    sources: Mapping[str, Any], target: Any, test: Any = "", **options: Any
) -> LLMReweight:
    """The problem on records in memory.

    Args:
        sources: For each name a list of mappings, a `datasets.Dataset` or anything else that gives
            mappings by number and has a length; or the path of a file.
        target: The same, of what the model should become good at; or a mapping of names to such.
        test: The same, to measure the verdict on; without it a quarter of the target is held out.
        options: Fields of `LLMReweight`.

    >>> records = [{"text": letter * 9} for letter in "abcdefghijkl"]
    >>> from_records({"a": records[:4], "b": records[4:8]}, target=records[8:]).names
    ['a', 'b']
    """
    return LLMReweight(sources=dict(sources), target=target, test=test, **options)
