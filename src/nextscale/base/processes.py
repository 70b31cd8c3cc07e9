"""How the processes of a run share a list of images, and what each has of them with all.

The images of a step, or of an evaluation, are one flat list. Each process has a contiguous share of it, as
even as can be; what an image is depends on neither. Every function here that says "all processes" has to be
called by all of them, equally often.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from nextscale.base.errors import NextscaleError


def share_of(total: int, part: int, num_parts: int) -> range:
    """The part-th of `num_parts` contiguous shares of range(total), whose lengths differ by one at most; the
    first are the longer."""
    each, rest = divmod(total, num_parts)
    start = part * each + min(part, rest)
    return range(start, start + each + (part < rest))


def my_share(total: int) -> range:
    """The share of this process."""
    state = PartialState()
    return share_of(total, state.process_index, state.num_processes)


def microbatch_shares(total: int, size: int) -> Iterator[tuple[range, bool]]:
    """This process's share of range(total), in parts of at most `size`, equally many in all processes: they
    exchange weights and gradients within each. Yields a part, and whether it is the last.

    A process with fewer than that many images has an empty part.
    """
    mine, longest = my_share(total), share_of(total, 0, PartialState().num_processes)
    num_parts = -(-len(longest) // size)
    for i in range(num_parts):
        part = share_of(len(mine), i, num_parts)
        yield part, i == num_parts - 1


def gathered(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all processes, in their order, to all processes; on the CPU.

    Args:
        rows: name to (B, ...), with the same names in all processes; B may differ, and may be 0.
    """
    parts: Sequence[Mapping[str, Tensor]] = gather_object([{name: each.cpu() for name, each in rows.items()}])
    return {name: torch.cat([part[name] for part in parts]) for name in rows}


def from_owners(mine: Any, owners: Sequence[int]) -> list[Any]:
    """What each of the owners has, to all processes: for what only few of them hold, and much of it.

    Args:
        mine: of this process; not looked at if it is none of the owners.
        owners: indices of processes, the same in all processes.
    """
    return [broadcast_object_list([mine], from_process=owner)[0] for owner in owners]


@contextmanager
def fail_together() -> Iterator[None]:
    """Make what fails in one process fail in all, which would otherwise wait for that one forever.

    All processes must enter the block, and none leaves it before all have come to its end. All raise what the
    first that failed did.

    Raises:
        NextscaleError, OSError: one was raised inside the block, in this process or in another.
    """
    error: NextscaleError | OSError | None = None
    try:
        yield
    except (NextscaleError, OSError) as caught:
        error = caught
    first = next((each for each in gather_object([_plain(error)]) if each is not None), None)
    if first is not None:
        raise first from error


def _plain(error: NextscaleError | OSError | None) -> NextscaleError | OSError | None:
    """An error that another process can be sent, whatever a library's own holds."""
    if not isinstance(error, OSError):
        return error
    return OSError(error.errno, error.strerror, error.filename) if error.strerror else OSError(str(error))
