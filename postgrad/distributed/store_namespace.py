"""The part of the process group's store that belongs to one start of the ranks.

`torchrun` keeps one store for all restarts of its processes, with the addresses of those that are dead
(pytorch/pytorch#135712), and its count of restarts differs between nodes and stays when a node leaves. So the ranks agree on a
name that no earlier start had: each asks under a token of its own, which no process before it can have been answered under.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from postgrad.errors import DistributedError

_POLL_SECONDS = 0.02


def open_namespace(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store under a prefix that all ranks of this start share, and no earlier start has used. Collective.

    Raises `DistributedError` when a rank does not arrive in time.
    """
    arrivals = dist.PrefixStore("postgrad-start", store)
    name = _welcome(arrivals, size, timeout) if rank == 0 else _arrive(arrivals, rank, timeout)
    return dist.PrefixStore(f"postgrad-{name}", store)


def _arrive(arrivals: dist.Store, rank: int, timeout: timedelta) -> str:
    """The name, as the first rank answers it to the token of this process."""
    token = uuid.uuid4().hex
    arrivals.set(f"arrived-{rank}", token)
    try:
        arrivals.wait([token], timeout)
    except RuntimeError as error:  # torch's errors of stores are of this kind
        raise _missing([0], timeout) from error
    name = arrivals.get(token).decode()
    arrivals.set(f"{name}-{rank}", "here")
    return name


def _welcome(arrivals: dist.Store, size: int, timeout: timedelta) -> str:
    """Make the name, and answer it to each other rank until that one has it.

    The token of a rank may be that of its dead predecessor until the rank has written its own, so a token that changes is
    answered, too.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    missing = list(range(1, size))
    while missing := [rank for rank in missing if not arrivals.check([f"{name}-{rank}"])]:
        for rank in missing:
            token = arrivals.get(f"arrived-{rank}").decode() if arrivals.check([f"arrived-{rank}"]) else ""
            if token and token not in answered:
                answered.add(token)
                arrivals.set(token, name)
        if time.monotonic() > end:
            raise _missing(missing, timeout)
        time.sleep(_POLL_SECONDS)
    return name


def _missing(ranks: Sequence[int], timeout: timedelta) -> DistributedError:
    listed = f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    return DistributedError(
        f"{listed} did not join within {timeout.total_seconds():g} s",
        where=f"rank {ranks[0]}",
        expected="all processes to start",
        hint="look at the output of that process; compute.collective_timeout_seconds is how long ranks wait",
    )
