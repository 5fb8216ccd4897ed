"""What every test has: a cache of measured choices of its own session, not the user's, and its share of the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
    # Before PyTorch is imported: workers that wait for one another's threads are slower than one worker alone.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTUPER_CACHE", str(tmp_path_factory.mktemp("choices")))
        if "FASTUPER_TEST_DEVICE" not in os.environ:  # `make gpu-check` says which way is tested
            patch.delenv("FASTUPER_CHOICES", raising=False)
        yield
