"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest

import kernels


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> Iterator[str]:
    """Each of the two implementations, chosen."""
    with kernels.use(request.param):
        yield request.param


@pytest.fixture
def parallel() -> None:
    """For tests of the order in which a GPU's programs finish."""
    if kernels.INTERPRETED:
        pytest.skip("Triton's interpreter runs one program after another: the same bits every run prove nothing in it")
