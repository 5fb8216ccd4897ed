"""What every test has: a cache of measured choices of its own session, and not the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTUPER_CACHE", str(tmp_path_factory.mktemp("choices")))
        patch.delenv("FASTUPER_CHOICES", raising=False)
        yield
