"""Mixtures for tools that take tokenized data or shares alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import yaml

from bilevel import InputError
from bilevel.problems.llm_reweight import formats
from bilevel.problems.llm_reweight.exports.job import Job, as_messages, as_text
from bilevel.problems.llm_reweight.exports.source import Source
from bilevel.problems.llm_reweight.exports.tool import Written


def megatron(job: Job) -> Written:
    """data_args.txt and per_split.json: token shares and prefixes in turn."""
    prefixes = [job.paths.get(s.name, f"{_stem(s)}_text_document") for s in job.sources]
    faults = [
        f"the prefix {prefix!r} of source {source.name} has a space, where Megatron-LM would cut "
        f"it; give another: --paths '{source.name}=PREFIX'."
        for source, prefix in zip(job.sources, prefixes, strict=True)
        if prefix.split() != [prefix]
    ]
    if faults:
        raise InputError(faults)
    words = [
        w for r, p in zip(job.shares.trained_tokens, prefixes, strict=True) for w in (repr(r), p)
    ]
    job.write("data_args.txt", " ".join(words) + "\n")
    split = {"train": words, "valid": None, "test": None}
    job.write("per_split.json", json.dumps(split, indent=1))
    use = f"--data-args-path {job.quoted('data_args.txt')}, or "
    use += f"--per-split-data-args-path {shlex.quote(str(job.target / 'per_split.json'))}"
    return Written(total=job.total, use=use, notes=_given(job, "prefixes"))


def nanotron(job: Job) -> Written:
    """mix.yaml with folders and token shares."""
    folders = [job.paths.get(source.name, _stem(source)) for source in job.sources]
    shares = list(job.shares.trained_tokens)
    data = {"dataset": {"dataset_folder": folders, "dataset_weights": shares}}
    job.write("mix.yaml", yaml.safe_dump({"data_stages": [{"data": data}]}, sort_keys=False))
    use = f"put dataset of {job.target / 'mix.yaml'} into your data stage"
    return Written(total=job.total, use=use, notes=_given(job, "folders"))


def streaming(job: Job) -> Written:
    """streams.yaml with a proportion of samples for each stream."""
    streams = {
        source.key: {"local": job.paths.get(source.name, source.key), "proportion": share}
        for source, share in zip(job.sources, job.shares.examples, strict=True)
    }
    job.write("streams.yaml", yaml.safe_dump({"streams": streams}, sort_keys=False))
    use = "\n".join(
        [
            f"streams = yaml.safe_load(open({str(job.target / 'streams.yaml')!r}))['streams']",
            "data = StreamingDataset(streams=[Stream(**s) for s in streams.values()], "
            f"epoch_size={job.total})",
        ]
    )
    return Written(total=job.total, use=use, notes=_given(job, "folders of MDS shards"))


def doremi(job: Job) -> Written:
    """doremi.json with a token share for each domain, for training and for evaluation."""
    shares = dict(zip((s.name for s in job.sources), job.shares.trained_tokens, strict=True))
    body = {"train_domain_weights": shares, "eval_domain_weights": shares}
    job.write("doremi.json", json.dumps(body, indent=1, ensure_ascii=False))
    return Written(total=job.total, use=f"--domain_config_path {job.quoted('doremi.json')}")


def hf(job: Job) -> Written:
    """interleave.json for datasets.interleave_datasets, and files that it can interleave."""
    text, files = job.form == "text", []
    same = job.alike and job.records != "messages"
    for source in job.sources:
        if same and source.is_json:
            source.originals  # noqa: B018, read for what it raises
            files.append(source.path)
        else:
            make = as_text if text else as_messages
            files.append(job.convert(f"{source.key}.jsonl", source, make))
    columns = ["text"] if text else ["messages"]
    if same and not text:
        schema = formats.detect(job.sources[0].first)
        columns = list(schema[1]) if schema else columns
    with_tools = [] if text else [s.name for s in job.sources if "tools" in s.facts.keys]
    notes = []
    if columns == ["messages"] and len(with_tools) == len(job.sources):
        columns = ["messages", "tools"]
    elif with_tools:
        notes.append(
            f"the tools of {', '.join(with_tools)} are left out: datasets mixes columns that all "
            "sources have; to keep them, export mixed"
        )
    if job.wanted:
        notes.append("--total has no effect: datasets draws until every source was used up")
    body = {
        "data_files": files,
        "columns": columns,
        "probabilities": list(job.shares.examples),
        "stopping_strategy": "all_exhausted",
        "seed": job.seed,
    }
    job.write("interleave.json", json.dumps(body, indent=1, ensure_ascii=False))
    use = "\n".join(
        [
            "import json; from datasets import interleave_datasets, load_dataset",
            f"mix = json.load(open({str(job.target / 'interleave.json')!r}))",
            'load = lambda f: load_dataset("json", data_files=f, split="train")',
            'parts = [load(f).select_columns(mix["columns"]) for f in mix["data_files"]]',
            'keys = ("probabilities", "stopping_strategy", "seed")',
            "data = interleave_datasets(parts, **{key: mix[key] for key in keys})",
        ]
    )
    return Written(total=job.whole, use=use, notes=notes)


def _stem(source: Source) -> str:
    embedded = source.path.startswith("embedded:")
    return source.key if embedded else str(Path(source.path).with_suffix(""))


def _given(job: Job, what: str) -> list[str]:
    open_ = [source.name for source in job.sources if source.name not in job.paths]
    if not open_:
        return []
    names = ", ".join(open_)
    return [f"the {what} of {names} are guesses; name them with --paths NAME=PATH NAME=PATH ..."]
