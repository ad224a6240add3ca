"""Solve H v = b knowing only products with H: conjugate gradients and its kin, counted steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InputError
from bilevel.tree import dot, flatten, norm, unflatten

Vector = list[Tensor]
Matvec = Callable[[Vector], Vector]


class LinearStatus(Enum):
    """Why a linear solve ended; the value is the message."""

    CONVERGED = "The residual is within the tolerance."
    STEPS = "The requested number of products was done."
    CURVATURE = (
        "A direction of no or negative curvature was met: the lower loss is not strongly convex "
        "here, so the answer is not unique. Add damping, or use a penalty solver."
    )
    DIVERGED = "The iteration diverged. Lower the step size below 2 over the largest eigenvalue."


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """v with H v ~ b, the norm of b - H v (nan if it was not measured), products spent, and why."""

    solution: Vector
    residual: float
    products: int
    status: LinearStatus


class LinearSolver(ABC):
    """A way to solve H v = b for symmetric H, given as products. Frozen keyword-only dataclass."""

    @abstractmethod
    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        """v with H v ~ b.

        Args:
            matvec: v -> H v.
            b: Right-hand side.
            start: First guess, zero without it; methods that cannot use one ignore it.
        """


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients on (H + damping I) v = b, with exit at non-positive curvature.

    In exact arithmetic done after as many steps as H has distinct eigenvalues, and

        |v_k - v|_H <= 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k |v_0 - v|_H

    At a direction p with p'Hp <= 0 it stops and returns what it has (Steihaug, 1983).

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> b = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> result = CG(steps=2).solve(lambda v: [A @ v[0]], [b])
    >>> [round(float(e), 6) for e in result.solution[0]], result.status.name
    ([1.0, 1.0], 'CONVERGED')

    Reference: Hestenes and Stiefel, 1952.
    """

    steps: int = 20
    """Most products with H; the first judges the start, where there is one and `steps` is not 1."""
    tolerance: float = 1e-6
    """Done when |b - H v| <= tolerance |b|."""
    damping: float = 0.0
    """Added to the diagonal of H."""
    precondition: Callable[[Vector], Vector] | None = None
    """Applies an approximate, symmetric positive inverse of H."""

    def __post_init__(self) -> None:
        _check(self, {"steps": 1, "tolerance": 0.0, "damping": 0.0})

    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        products = 0

        def damped(v: Vector) -> Vector:
            nonlocal products
            products += 1
            return _plus(matvec(v), v, self.damping) if self.damping else matvec(v)

        if self.steps == 1:  # a product that judges the start leaves none to better it
            start = None
        v = _zeros(b) if start is None else [t.clone() for t in start]
        r = [t.clone() for t in b] if start is None else _plus(b, damped(v), -1.0)
        whole, size = norm(b), norm(r)
        if not size <= whole:  # zero is a better start, as after H has become indefinite
            v, r, size = _zeros(b), [t.clone() for t in b], whole
        goal = self.tolerance * whole
        s = self.precondition(r) if self.precondition else r
        p, rs = s, float(dot(r, s)) if self.precondition else size * size
        pp, largest = size * size, 0.0
        status = LinearStatus.STEPS
        while size > goal and products < self.steps:
            hp = damped(p)
            bend = float(dot(p, hp))
            pp = float(dot(p, p)) if self.precondition else pp
            largest = max(largest, bend / pp)
            if bend <= torch.finfo(b[0].dtype).eps * largest * pp:
                status = LinearStatus.CURVATURE
                break
            step = rs / bend
            v, r = _plus(v, p, step), _plus(r, hp, -step)
            size = norm(r)
            if not math.isfinite(size):
                status = LinearStatus.DIVERGED
                break
            s = self.precondition(r) if self.precondition else r
            new = float(dot(r, s)) if self.precondition else size * size
            p, ratio = _plus(s, p, new / rs), new / rs
            pp, rs = new + ratio**2 * pp, new  # |p|^2: r is orthogonal to the previous p
        if size <= goal:
            status = LinearStatus.CONVERGED
        return LinearResult(solution=v, residual=size, products=products, status=status)


@dataclass(frozen=True, kw_only=True)
class MINRES(LinearSolver):
    """Minimal residual on (H + damping I) v = b: symmetric H, also indefinite, residual monotone.

    SciPy's `minres` on the flattened vector, in float64 on the CPU. A singular H gives a least
    squares solution when b is in its range.

    Reference: Paige and Saunders, 1975.
    """

    steps: int = 20
    """Most products with H."""
    tolerance: float = 1e-6
    """Done when |b - H v| <= tolerance |b|."""
    damping: float = 0.0
    """Added to the diagonal of H."""

    def __post_init__(self) -> None:
        _check(self, {"steps": 1, "tolerance": 0.0, "damping": 0.0})

    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        import numpy as np
        from scipy.sparse import linalg

        products = 0
        size = sum(t.numel() for t in b)

        def unpack(flat: np.ndarray) -> Vector:
            return unflatten(torch.from_numpy(np.asarray(flat)), b)

        def pack(v: Vector) -> np.ndarray:
            return flatten(v).detach().double().cpu().numpy()

        def apply(flat: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            v = unpack(flat)
            return pack(_plus(matvec(v), v, self.damping))

        build: Any = linalg.LinearOperator  # the stub knows only its base class
        operator = build((size, size), matvec=apply, dtype=np.float64)
        first = None if start is None else pack(start)
        flat, _ = linalg.minres(
            operator, pack(b), x0=first, rtol=self.tolerance, maxiter=max(1, self.steps - 2)
        )
        v = unpack(flat)
        rest = norm(_plus(_plus(b, matvec(v), -1.0), v, -self.damping))
        done = rest <= max(self.tolerance, 1e-12) * norm(b) * 10
        status = LinearStatus.CONVERGED if done else LinearStatus.STEPS
        return LinearResult(solution=v, residual=rest, products=products + 1, status=status)


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """The Neumann series v_K = lr sum_{k<K} (I - lr H)^k b, by v <- v - lr (H v - b).

    With v_0 = 0 the error is (I - lr H)^K H^{-1} b exactly; converges for lr < 2 / L. With momentum
    the step is v <- v - lr (H v - b) + momentum (v - v_before): the adjoint fixed point of gradient
    descent with momentum, y <- y - lr grad_y g + momentum (y - y_before), as the plain series is
    that of plain gradient descent; converges for lr < 2 (1 + momentum) / L.

    Reference: Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit
    Differentiation, 2020; Grazzi, Franceschi, Pontil, Salzo, On the Iteration Complexity of
    Hypergradient Computation, 2020 (2006.16218), for maps with momentum.
    """

    steps: int = 20
    """Terms of the series; the first costs no product when it starts at zero."""
    lr: float = 0.1
    """Below 2 over the largest eigenvalue of H."""
    momentum: float = 0.0
    """Share of the last move that the next one keeps."""

    def __post_init__(self) -> None:
        _check(self, {"steps": 1, "momentum": 0.0})
        if not self.lr > 0:
            raise InputError(f"lr must be positive, got lr={self.lr}.")
        if not self.momentum < 1:
            raise InputError(f"momentum must be below 1, got momentum={self.momentum}.")

    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        v = [self.lr * t for t in b] if start is None else start
        products, size = 0, math.nan
        limit = 1e8 * (norm(b) + norm(v))
        move = v if start is None else _zeros(v)
        for _ in range(self.steps - (start is None)):
            r = _plus(b, matvec(v), -1.0)
            products, size = products + 1, norm(r)
            move = [self.lr * p + self.momentum * q for p, q in zip(r, move, strict=True)]
            v = _plus(v, move, 1.0)
            if not size <= limit:
                return LinearResult(
                    solution=v, residual=size, products=products, status=LinearStatus.DIVERGED
                )
        return LinearResult(solution=v, residual=size, products=products, status=LinearStatus.STEPS)


@dataclass(frozen=True, kw_only=True)
class Identity(LinearSolver):
    """v = scale b: no product at all, as if H were I / scale. Can point uphill.

    Reference: Luketina et al., T1-T2, 2015; Fung et al., Jacobian-free backpropagation, 2021.
    """

    scale: float = 1.0
    """The inverse curvature assumed; the inner step size makes it one Neumann term."""

    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        v = [self.scale * t for t in b]
        return LinearResult(solution=v, residual=math.nan, products=0, status=LinearStatus.STEPS)


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    """(damping I + C W^+ C')^{-1} b by Woodbury, C = `rank` random columns of H and W = C's rows.

    Exact for (H + damping I) at full rank; otherwise within E / (damping (damping + E)) of its
    inverse, E = |H - C W^+ C'|. Costs `rank` products, and `rank` vectors of memory.

    Reference: Hataya and Yamada, Nystrom Method for Accurate and Scalable Implicit Differentiation,
    AISTATS 2023 (2302.09726).
    """

    rank: int = 10
    """Columns of H."""
    damping: float = 0.01
    """Added to the diagonal; biases the answer."""
    seed: int = 0
    """Of the choice of columns."""

    def __post_init__(self) -> None:
        _check(self, {"rank": 1})
        if not self.damping > 0:
            raise InputError(f"damping must be positive, got damping={self.damping}.")

    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        flat = _wide(flatten(b))
        rank = min(self.rank, len(flat))
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(flat), generator=generator)[:rank].to(flat.device)

        def column(i: Tensor) -> Tensor:
            unit = torch.zeros_like(flat)
            unit[i] = 1.0
            return _wide(flatten(matvec(unflatten(unit, b))))

        c = torch.stack([column(i) for i in chosen], dim=1)
        w = c[chosen]
        inner = self.damping * (w + w.T) / 2 + c.T @ c
        # W may be singular, up to rounding of c; what solves that is in LAPACK, on the CPU
        least = rank * torch.finfo(flat.dtype).eps
        both = (t.double().cpu() for t in (inner, c.T @ flat))
        small = torch.linalg.lstsq(*both, rcond=least, driver="gelsd").solution
        v = (flat - c @ small.to(flat)) / self.damping
        return LinearResult(
            solution=unflatten(v, b),
            residual=math.nan,
            products=rank,
            status=LinearStatus.STEPS,
        )


@dataclass(frozen=True, kw_only=True)
class Fisher(LinearSolver):
    """(damping I + G'G / m)^{-1} b by Woodbury, G the m given gradients as rows: no product.

        v = (b - G' (m damping I + G G')^{-1} G b) / damping

    The empirical Fisher matrix G'G / m stands in for H, which it resembles near the optimum of a
    likelihood and else need not. Memory: m vectors.

    Reference: Frantar, Kurtic, Alistarh, M-FAC: Efficient Matrix-Free Approximations of
    Second-Order Information, 2021 (2107.03356). Deviation: solved at once, not by recursion.
    """

    rows: Sequence[Vector] = ()
    """Gradients of the lower loss on parts of its data; without any v = b / damping."""
    damping: float = 0.01
    """Added to the diagonal; biases the answer."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"damping must be positive, got damping={self.damping}.")

    def solve(self, matvec: Matvec, b: Vector, start: Vector | None = None) -> LinearResult:
        v = b
        if self.rows:
            flat = _wide(flatten(b))
            g = torch.stack([flatten(row).to(flat) for row in self.rows])
            inner = g @ g.T
            inner.diagonal().add_(len(g) * self.damping)
            v = unflatten(flat - g.T @ torch.linalg.solve(inner, g @ flat), b)
        return LinearResult(
            solution=[t / self.damping for t in v],
            residual=math.nan,
            products=0,
            status=LinearStatus.STEPS,
        )


def _wide(flat: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return flat if flat.dtype == torch.float64 else flat.float()


def _zeros(like: Vector) -> Vector:
    return [torch.zeros_like(t) for t in like]


def _plus(a: Vector, b: Vector, factor: float) -> Vector:
    """a + factor b."""
    return [torch.add(p, q, alpha=factor) for p, q in zip(a, b, strict=True)]


def _check(options: object, least: dict[str, float]) -> None:
    faults = [
        f"{name} must be at least {low}, got {name}={getattr(options, name)}."
        for name, low in least.items()
        if getattr(options, name) < low
    ]
    if faults:
        raise InputError(faults)
