"""Files taken out of gzip and zst, and refused where they are cut off, damaged or too large."""

from __future__ import annotations

import zlib
from pathlib import Path

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.faults import fault

MOST = 2_000_000_000
"""Bytes of a file that is read as a whole; as text and tokens they take some ten times as much."""

PIECE = 1 << 16
"""Compressed bytes taken at a time; zst may make some thousand times as many of them."""


def decompressed(data: bytes, path: str) -> tuple[bytes, str]:
    """The content without its compression, and the ending that tells its kind.

    Raises:
        InputError: If it cannot be taken out.
    """
    name = Path(path.lower())
    gzip, zst = data.startswith(b"\x1f\x8b"), data.startswith(b"\x28\xb5\x2f\xfd")
    packed = name.suffix in (".gz", ".zst")
    if packed and not (gzip or zst):
        found = f"a {name.suffix} file that is not compressed"
        fix = f"rename it to end in {Path(name.stem).suffix or '.jsonl'}"
        raise InputError(fault(f"{path}:1", found, f"{name.suffix[1:]} data", fix))
    if gzip:
        data = _gunzip(data, path)
    elif zst:
        data = _unzst(data, path)
    return data, Path(name.stem).suffix if packed else name.suffix


def too_large(path: str, size: int) -> str:
    """The sentence about a file that cannot be read as a whole."""
    found = f"{size / 1e9:.1f} GB in a file that is read as a whole"
    fix = "write its records on lines of their own into an uncompressed .jsonl"
    return fault(path, found, f"at most {MOST / 1e9:.0f} GB, or JSON Lines", fix)


def not_installed(path: str, package: str, otherwise: str) -> str:
    """The sentence about a reader that is missing."""
    fix = f"pip install 'bilevel[formats]', or {otherwise}"
    return fault(path, f"a file that needs {package}", f"{package} to be installed", fix)


def _gunzip(data: bytes, path: str) -> bytes:
    parts, rest = [], data
    try:
        while rest.strip(b"\0"):
            stream = zlib.decompressobj(wbits=31)
            parts.append(stream.decompress(rest, MOST))
            if not stream.eof:
                many = bool(stream.unconsumed_tail)
                raise InputError(too_large(path, MOST + 1) if many else _cut_off(path, "gzip"))
            rest = stream.unused_data
    except zlib.error as error:
        raise InputError(_damaged(path, "gzip", error)) from None
    return b"".join(parts)


def _unzst(data: bytes, path: str) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise InputError(not_installed(path, "zstandard", f"unzstd {path}")) from None
    parts, size, rest = [], 0, data
    try:
        while rest:
            stream = zstandard.ZstdDecompressor().decompressobj()
            for start in range(0, len(rest), PIECE):
                parts.append(stream.decompress(rest[start : start + PIECE]))
                size += len(parts[-1])
                if size > MOST:
                    raise InputError(too_large(path, size))
                if stream.eof:
                    rest = stream.unused_data + rest[start + PIECE :]
                    break
            else:
                raise InputError(_cut_off(path, "zst"))
    except zstandard.ZstdError as error:
        raise InputError(_damaged(path, "zst", error)) from None
    return b"".join(parts)


def _cut_off(path: str, name: str) -> str:
    found = f"{name} data that stops early (truncated)"
    return fault(f"{path}:1", found, "a whole file", "copy or compress the file again")


def _damaged(path: str, name: str, error: Exception) -> str:
    found = f"{name} data that is damaged ({error})"
    return fault(f"{path}:1", found, "a whole file", "copy or compress the file again")
