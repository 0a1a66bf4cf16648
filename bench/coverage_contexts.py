"""A pytest plugin: coverage notes for every line which tests ran it. `bench.core_tests` loads it.

python -m coverage run ... -m pytest -p bench.coverage_contexts ...
"""

from collections.abc import Iterator

import coverage
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Names the test, with its fixtures, as the one that runs whatever runs until it ends."""
    measuring = coverage.Coverage.current()
    assert measuring is not None
    measuring.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        measuring.switch_context("")
