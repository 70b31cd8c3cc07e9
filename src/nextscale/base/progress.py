"""A progress bar for whatever takes more than two seconds."""

import os
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm as notebook_tqdm

DELAY = 2.0  # seconds until a bar is shown; what is done by then needs none


def bar_of(total: int, what: str, unit: str) -> Any:
    """A bar of tqdm's, on a terminal's error output or in a notebook, of the first process alone.

    Args:
        total: of the units to do.
    """
    is_first, in_notebook = os.environ.get("RANK", "0") == "0", issubclass(tqdm, notebook_tqdm)
    disable = (False if in_notebook else None) if is_first else True  # None: where there is no terminal
    return tqdm(total=total, desc=what, unit=unit, delay=DELAY, leave=False, disable=disable)
