"""How far a command's run of evaluations is, for whoever waits."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing

from tqdm import tqdm

from ..pool import Progress

Watch = Callable[[str, int], AbstractContextManager[Progress]]
"""watch(name, total): the run of this name begins; its `Progress` is told of so many steps, and may interrupt it."""


@contextlib.contextmanager
def bar(name: str, total: int) -> Iterator[Progress]:
    """A `Watch`: a bar on the terminal."""
    with closing(tqdm(total=total, desc=name, unit="evaluation", leave=False)) as shown:

        def step(*_) -> None:
            shown.set_postfix_str("sampling", refresh=False)  # else it would name the last phase before it
            shown.update()

        yield Progress(step=step, phase=shown.set_postfix_str)
