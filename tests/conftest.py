"""Settings of every test session: threads of workers, garbage collection, and a cache folder of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SEPARATE = [Path(__file__).parent / name for name in ("foreign", "page", "serve")]
"""Tests of commands of their own, `make test-foreign` and `make test-page`."""

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
    # Before PyTorch is imported. Workers that wait for each other's threads are slower than a single worker.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests that need the real libraries or a browser, unless the command names their folder."""
    if collection_path not in SEPARATE:
        return None
    named = (Path(argument.split("::")[0]).resolve() for argument in config.args)
    return None if any(path.is_relative_to(collection_path) for path in named) else True


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt the imported modules from garbage collection, and collect less often.

    A full collection of PyTorch's and Transformers' half million objects takes 0.3 to 1 s. On two cores of an AMD EPYC
    (Zen 4) full collections were 11 % of the suite's processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="session")
def _own_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep measured choices in the session's own folder, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTUPER_CACHE", str(tmp_path_factory.mktemp("choices")))
        if "FASTUPER_TEST_DEVICE" not in os.environ:  # `make gpu-check` sets both variables
            patch.delenv("FASTUPER_CHOICES", raising=False)
        yield
