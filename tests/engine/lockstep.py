"""Several simulated processes in one, which run in turns and meet: batch norms over all of their batches.

Each runs in a thread, but never two at once: one runs until it meets the others, and the state of torch's random numbers
is its own.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class Lockstep:
    """``count`` functions that run in turns."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._turn = threading.Condition()
        self._whose = 0
        self._place = threading.local()
        self._brought: list[Any] = [None] * count
        self._found: list[Any] = [None] * count
        self._error: BaseException | None = None

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """``work(rank)`` of every rank -> what they return; an error in one is raised here."""
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        assert grad and not autocast, "switch them on inside of the work: they belong to a thread"
        results: list[Any] = [None] * self.count
        random_state = _random_state()

        def body(rank: int) -> None:
            self._place.rank = rank
            try:
                self._await(rank)
                _set_random_state(random_state)
                results[rank] = work(rank)
            except BaseException as error:
                self._error = self._error or error
            self._pass(rank)

        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "the simulated processes wait for each other"
        if self._error:
            raise self._error
        return results

    def meet(self, mine: Any, together: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
        """Wait until every rank has brought its part; the last one works out ``together``, each gets its own share."""
        rank = self._place.rank
        self._brought[rank] = mine
        if rank == self.count - 1:
            self._found = list(together(self._brought))
        state = _random_state()
        self._pass(rank)
        self._await(rank)
        _set_random_state(state)
        return self._found[rank]

    def _pass(self, rank: int) -> None:
        with self._turn:
            self._whose = (rank + 1) % self.count
            self._turn.notify_all()

    def _await(self, rank: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._whose == rank or self._error is not None, timeout=100)
            if self._error is not None:
                raise RuntimeError("another simulated process failed")


@contextmanager
def statistics_of_all(method: nn.Module, together: Lockstep) -> Iterator[None]:
    """Inside, every batch norm in training takes its statistics over the batches of all simulated processes."""
    norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    seen = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    original = torch.batch_norm

    def batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Tensor:
        def joined(parts: Sequence[Tensor]) -> Sequence[Tensor]:
            rows = [part.transpose(0, 1).flatten(1) for part in parts]  # (C, sites)
            whole = original(torch.cat(rows, dim=1)[None], weight, bias, mean, var, True, *rest)[0]
            shares = whole.split([row.shape[1] for row in rows], dim=1)
            shapes = [(part.shape[1], part.shape[0], *part.shape[2:]) for part in parts]
            # Copies: what follows may work in place.
            return [share.reshape(shape).transpose(0, 1).clone() for share, shape in zip(shares, shapes, strict=True)]

        return together.meet(x, joined) if training else original(x, weight, bias, mean, var, False, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "batch_norm", batch_norm)
        # Sparse maps would make their values again in the backward pass, one simulated process at a time.
        patch.setattr("models.sparse.functions.worth_it", lambda: False)
        yield
    for norm, before in zip(norms, seen, strict=True):
        if before is not None and norm.num_batches_tracked is not None:  # each simulated process has counted
            norm.num_batches_tracked.copy_(before + (norm.num_batches_tracked - before) // together.count)


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
