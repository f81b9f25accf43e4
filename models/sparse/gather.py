"""Sums of gathered rows with an exact, equally fast backward pass: how sites move between tiles, halos and dense maps.

torch's ``index_add_``, which the backward pass of plain indexing needs, is slow and, on a GPU, not repeatable. Here
both directions are gathers: where the forward pass reads each row up to ``r`` times, the backward pass sums up to
``r`` rows. ``embedding_bag`` does both, a bag of no rows being a row of zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan:
    """Which row of the source each row of the result is: ``source`` (rows,) int64, -1 for a row of zeros.

    Everything derived from it is made on first use and kept.
    """

    def __init__(self, source: Tensor, num_rows: int) -> None:
        self.source = source
        self.num_rows = num_rows
        """rows of the source"""
        self._forward: tuple[Tensor, Tensor] | None = None
        self._backward: tuple[Tensor, Tensor] | None = None
        self._absent: Tensor | None = None

    @property
    def absent(self) -> Tensor:
        """Rows of the result that have no source, (n,) int64."""
        if self._absent is None:
            self._absent = (self.source < 0).nonzero().squeeze(1)
        return self._absent

    def bags(self) -> tuple[Tensor, Tensor]:
        """Rows to read, and where each result's begin."""
        if self._forward is None:
            there = self.source >= 0
            self._forward = self.source[there], there.cumsum(0) - there.long()
        return self._forward

    def transposed_bags(self) -> tuple[Tensor, Tensor]:
        """The same for the backward pass: which rows of the result read each row of the source."""
        if self._backward is None:
            rows = self.bags()[0]
            readers = (self.source >= 0).nonzero().squeeze(1)[rows.argsort(stable=True)]
            counts = torch.bincount(rows, minlength=self.num_rows)
            self._backward = readers, counts.cumsum(0) - counts
        return self._backward

    def inverse(self) -> "Plan":
        """The plan that brings every row back, where no row is read twice."""
        back = torch.full((self.num_rows,), -1, dtype=torch.long, device=self.source.device)
        there = (self.source >= 0).nonzero().squeeze(1)
        back[self.source[there]] = there
        return Plan(back, len(self.source))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return gather(rows, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter(grad, ctx.plan), None


def gather(rows: Tensor, plan: Plan) -> Tensor:
    """(rows, C) -> (len(plan.source), C), without a backward pass."""
    return F.embedding_bag(plan.bags()[0], rows.contiguous(), plan.bags()[1], mode="sum")


def scatter(rows: Tensor, plan: Plan) -> Tensor:
    """The adjoint of :func:`gather`: (len(plan.source), C) -> (plan.num_rows, C)."""
    return F.embedding_bag(plan.transposed_bags()[0], rows.contiguous(), plan.transposed_bags()[1], mode="sum")


def gathered(rows: Tensor, plan: Plan) -> Tensor:
    """:func:`gather` with a backward pass."""
    return _Gather.apply(rows, plan)
