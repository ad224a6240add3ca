"""Small worlds for benchmarks/regimes.py: sources, a target, and mixtures a person would try.

Words are made up, one token each, so that a model of two blocks learns what matters in a few
hundred steps. A seed draws everything anew. A record is a text, or a question and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Record = str | tuple[str, str]
Weights = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class World:
    """One draw of a regime."""

    sources: dict[str, Sequence[Record]]
    target: Sequence[Record]
    test: Sequence[Record]
    by_hand: dict[str, Weights] = field(default_factory=dict)
    """Mixtures by name, not normalized; sources left out have no weight."""


def ways(seed: int) -> World:
    """Ten topics, each answered in one of two ways by a source each, and hollow answers to all.

    The target is answered in the first way with a share that differs by topic, and in the second
    way else: a source that is too large in the uniform mixture is still needed. Topics share
    questions and answers, only the first word tells them apart.
    """
    shares = (0.95, 0.9, 0.9, 0.85, 0.85, 0.8, 0.8, 0.75, 0.7, 0.6)
    draw, groups, other = random.Random(seed), len(shares), 2
    words = made_up(groups + other + 6 + 8 + 24, draw)
    topics, asked, said, fill = parts(words, groups + other, 6, 8, 24)
    answers = [{a: draw.sample(said, 2) for a in asked} for _ in topics]

    def question(k: int, a: str) -> str:
        return f"{draw.choice(fill)} {draw.choice(fill)} {topics[k]} {a}"

    def one(k: int, share: float) -> Record:
        a = draw.choice(asked)
        return question(k, a), " " + answers[k][a][draw.random() >= share]

    def hollow() -> Record:
        return question(draw.randrange(groups), draw.choice(asked)), " " + draw.choice(said)

    sources = {}
    for k in range(groups):
        sources[f"first {k}"] = many(600, lambda k=k: one(k, 1.0))
        sources[f"second {k}"] = many(600, lambda k=k: one(k, 0.0))
    sources |= {f"hollow {k}": many(600, hollow) for k in range(6)}
    sources |= {f"other {k}": many(600, lambda k=k: one(groups + k, 1.0)) for k in range(other)}
    return World(
        sources=sources,
        target=[one(i % groups, shares[i % groups]) for i in range(600)],
        test=[one(i % groups, shares[i % groups]) for i in range(511)],
        by_hand=_two_ways(shares),
    )


def styles(seed: int) -> World:
    """As `ways` with eight topics that share neither questions nor answers.

    Hollow records give one of four answers to a topic, and a model of one topic knows nothing of
    another, so that MixMin's models are at no disadvantage.
    """
    shares = (0.95, 0.9, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
    draw, groups, other, n = random.Random(seed), len(shares), 4, 4
    words = made_up(groups * n * 3 + other * n * 2 + 24, draw)
    asked, one, two, more, fill = parts(words, *[groups * n] * 3, other * n * 2, 24)

    def record(question: str, answer: str) -> Record:
        return f"{draw.choice(fill)} {draw.choice(fill)} {question}", " " + answer

    def row(k: int, share: float) -> Record:
        i = k * n + draw.randrange(n)
        return record(asked[i], one[i] if draw.random() < share else two[i])

    def hollow() -> Record:
        k = draw.randrange(groups)
        i, j = k * n + draw.randrange(n), k * n + draw.randrange(n)
        return record(asked[i], draw.choice((one[i], two[i], one[j], two[j])))

    def away(k: int) -> Record:
        i = 2 * (k * n + draw.randrange(n))
        return record(more[i], more[i + 1])

    sources = {}
    for k in range(groups):
        sources[f"first {k}"] = many(400, lambda k=k: row(k, 1.0))
        sources[f"second {k}"] = many(400, lambda k=k: row(k, 0.0))
    sources |= {f"hollow {k}": many(400, hollow) for k in range(8)}
    sources |= {f"other {k}": many(400, lambda k=k: away(k)) for k in range(other)}
    return World(
        sources=sources,
        target=[row(i % groups, shares[i % groups]) for i in range(480)],
        test=[row(i % groups, shares[i % groups]) for i in range(511)],
        by_hand=_two_ways(shares),
    )


def skills(seed: int) -> World:
    """Four easy and six hard skills, each in a source of its own, and hollow look-alikes."""
    draw, easy, hard, other = random.Random(seed), 4, 6, 4
    words = made_up(easy + hard + other + 12 + 8, draw)
    heads, asked, said = parts(words, easy + hard + other, 12, 8)
    answers = [
        {a: draw.choice(said) for a in asked}
        if k >= easy
        else dict.fromkeys(asked, draw.choice(said))
        for k in range(easy + hard + other)
    ]

    def row(k: int, *, known: bool = True) -> Record:
        out = [heads[k]]
        for _ in range(6):
            a = draw.choice(asked)
            out += [a, answers[k][a] if known else draw.choice(said)]
        return " ".join(out)

    sources = {f"easy {k}": many(400, lambda k=k: row(k)) for k in range(easy)}
    sources |= {f"hard {k}": many(400, lambda k=k: row(easy + k)) for k in range(hard)}
    sources |= {
        f"hollow {k}": many(400, lambda: row(easy + draw.randrange(hard), known=False))
        for k in range(6)
    }
    sources |= {f"other {k}": many(400, lambda k=k: row(easy + hard + k)) for k in range(other)}
    count = easy + hard
    good = {f"easy {k}": 0.05 for k in range(easy)} | {f"hard {k}": 0.8 / 6 for k in range(hard)}
    return World(
        sources=sources,
        target=[row(i % count) for i in range(160)],
        test=[row(i % count) for i in range(260)],
        by_hand={"hard 0.8, easy 0.2": good},
    )


def crowd(seed: int) -> World:
    """Half of the target is easy and offered six times; half is hard, offered once among fakes."""
    draw = random.Random(seed)
    easy, hard = parts(made_up(8 + 14, draw), 8, 14)
    ring = dict(zip(easy, easy[1:] + easy[:1], strict=True))

    def table() -> dict[tuple[str, str], str]:
        return {(a, b): draw.choice(hard) for a in hard for b in hard}

    right, wrong = table(), [table() for _ in range(4)]

    def around() -> Record:
        w, out = draw.choice(easy), []
        for _ in range(24):
            out.append(w)
            w = ring[w] if draw.random() < 0.9 else draw.choice(easy)
        return " ".join(out)

    def walk(rule: dict[tuple[str, str], str]) -> Record:
        out = [draw.choice(hard), draw.choice(hard)]
        while len(out) < 24:
            near = draw.random() < 0.85
            out.append(rule[out[-2], out[-1]] if near else draw.choice(hard))
        return " ".join(out)

    sources = {f"easy {i}": many(400, around) for i in range(6)}
    sources["hard"] = many(4000, lambda: walk(right))
    sources |= {f"fake {i}": many(4000, lambda i=i: walk(wrong[i])) for i in range(4)}
    return World(
        sources=sources,
        target=[walk(right) if i % 2 else around() for i in range(160)],
        test=[walk(right) if i % 2 else around() for i in range(256)],
        by_hand={"hard 0.8": {"hard": 0.8} | {f"easy {i}": 0.2 / 6 for i in range(6)}},
    )


def made_up(count: int, draw: random.Random) -> list[str]:
    """Different words of two syllables."""
    ends, vowels = "bdfgklmnprst", "aeiou"
    halves = [c + v for c in ends for v in vowels]
    return draw.sample([a + b for a in halves for b in halves], count)


def parts(words: Sequence[str], *sizes: int) -> list[list[str]]:
    """Consecutive parts of these sizes."""
    rest = iter(words)
    return [[next(rest) for _ in range(size)] for size in sizes]


def many(count: int, make: Callable[[], Record]) -> list[Record]:
    return [make() for _ in range(count)]


def _two_ways(shares: Sequence[float]) -> dict[str, Weights]:
    first = {f"first {k}": 1.0 for k in range(len(shares))}
    exact = {f"first {k}": s for k, s in enumerate(shares)}
    exact |= {f"second {k}": 1 - s for k, s in enumerate(shares)}
    return {"exact shares": exact, "first ways": first, "both ways even": dict.fromkeys(exact, 1.0)}
