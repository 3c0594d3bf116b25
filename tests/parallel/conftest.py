"""Several gloo processes that each run the same function of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """``pool(size).run(function, *args)``; the processes of a size stay until the end of the session."""
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield get
    for one in pools.values():
        one.close()
