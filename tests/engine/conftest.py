"""For tests of engines: the geometries that most of them run on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.fields import GEOMETRIES


@pytest.fixture(params=sorted(GEOMETRIES))
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return GEOMETRIES[request.param]
