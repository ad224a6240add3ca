"""Bytes of training files, and examples as they are read from them."""

import gzip
import io
import json

import pytest

from bilevel.problems.llm_reweight.templates import Style, named, write

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

OK = '{"text": "a"}\n'
GZIP = gzip.compress(OK.encode(), mtime=0)
ZST = zstandard.ZstdCompressor().compress(OK.encode())


def written(example):
    return list(write(example, Style(), named("chatml", end=""))[0])


def table(rows):
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def messages(*turns):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
