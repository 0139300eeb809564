"""The physical batches of one logical batch, several at once, in threads.

Where batches are small, torch's threads wait for one another at every operator: two batches on one thread each take less time
than one batch after the other on two. What is summed, clipped and noised stays the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from dpbitfit_fx.errors import DataError
from dpbitfit_fx.lowering import float32_products

__all__ = ["check_parallel", "parallel_sum"]

Batch = TypeVar("Batch")


def check_parallel(count: int, backend: str, device: torch.device) -> int:
    """`count`, or DataError where so many batches at once are not possible."""
    if type(count) is not int or count < 1:
        raise DataError(f"parallel_batches must be a positive number of physical batches; got {count!r}.")
    if count > 1 and (backend != "eager" or device.type != "cpu"):
        raise DataError(
            f"parallel_batches={count} needs backend='eager' and a model on the CPU; this one runs with backend={backend!r} "
            f"on {device}, where one physical batch uses the whole device. Leave parallel_batches out."
        )
    return count


def parallel_sum(
    batches: Iterable[Batch],
    accumulate: Callable[[Batch, torch.Tensor], torch.Tensor],
    zero: Callable[[], torch.Tensor],
    count: int,
    cost: Callable[[Batch], float] = lambda batch: 1.0,
) -> torch.Tensor:
    """The sum [D] over all batches, `count` of them at once, each on its share of torch's threads.

    A batch goes to the thread whose batches so far cost least, by the public `cost`, and the threads' sums are added in their
    order: the same batches give the same bits. The batches are made one after the other by the caller's thread; at most twice
    `count` of them exist. An error in one ends them all.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    sums, costs = [zero() for _ in range(count)], [0.0] * count

    def add(batch: Batch, at: int) -> None:
        with torch.no_grad():
            sums[at] = accumulate(batch, sums[at])

    # Both settings belong to the process: what one thread sets and puts back would reach into another's product.
    with float32_products():
        lanes = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(share,)) for _ in range(count)]
        try:
            pending: deque[Future[None]] = deque()
            for batch in batches:
                if len(pending) == 2 * count:
                    pending.popleft().result()
                at = costs.index(min(costs))
                costs[at] += cost(batch)
                pending.append(lanes[at].submit(add, batch, at))
            for future in pending:
                future.result()
        finally:
            for lane in lanes:
                lane.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total
