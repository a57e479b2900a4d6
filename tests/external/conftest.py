"""torchvision and timm, also beside a torch build that torchvision's compiled operators do not fit."""

import pytest

from bench.networks import import_torchvision


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, if installed."""
    try:
        return import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm", exc_type=ImportError)
