"""A progress bar on stderr, shown on a terminal only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..backends import Progress


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Yields what to call with (seconds done, seconds in all); the bar is gone when the block ends."""
    from tqdm import tqdm

    bar_format = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(total=1.0, desc=label, disable=None, leave=False, bar_format=bar_format) as bar:

        def report(done: float, total: float) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
