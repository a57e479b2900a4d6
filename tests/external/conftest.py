"""torchvision and timm, also beside a torch build that torchvision's compiled operators do not fit."""

import contextlib

import pytest
import torch

_operators = []


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, if installed. Its models need none of its compiled operators, but its import needs their schemas."""
    with contextlib.suppress(RuntimeError, ImportError):
        import torchvision

        return torchvision
    library = torch.library.Library("torchvision", "FRAGMENT")
    _operators.append(library)  # they go when the library object goes
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision", exc_type=ImportError)


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm", exc_type=ImportError)
