"""Does an installed brn_kernels work? Run by `make wheel-check`, in an environment that has only the wheel and torch.

A training step of the native backend must agree with the reference's, and both must come from the wheel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import brn_kernels as brn
from brn_kernels.build import find


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--within", type=Path, required=True, help="the folder that must hold the package")
    within = parser.parse_args().within.resolve()
    built = find()
    assert not isinstance(built, str), f"the wheel's native libraries: {built}"
    for path in (Path(brn.__file__), built.cpu):
        assert path.resolve().is_relative_to(within), f"{path} is not of the wheel"
    assert not list(within.glob("**/brn_kernels/_native/.*")), "the wheel carries what only building needs"
    assert next(within.glob("**/brn_kernels/csrc/ops.cpp")), "`brn build` would have no sources"

    torch.manual_seed(0)
    x, dy = torch.randn(8, 6, 5, 5), torch.randn(8, 6, 5, 5)
    expected, got = training_step("reference", x, dy), training_step("native", x, dy)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
    print(f"brn_kernels {brn.__version__} with torch {torch.__version__}: {built.cpu}")
    print(f"a training step of native agrees with reference: {', '.join(expected)}")
    return 0


def training_step(backend: str, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of a layer with open limits, a residual and ReLU."""
    layer = brn.BatchRenorm2d(x.shape[1], schedule=brn.ClipSchedule.constant(1.2, 0.3), activation="relu")
    x, residual = x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()
    with brn.use_backend(backend):
        y = layer(x, residual=residual)
        y.backward(dy)
    gradients = {"x": x, "residual": residual, **dict(layer.named_parameters())}
    return (
        {"y": y.detach()}
        | {f"d{name}": tensor.grad for name, tensor in gradients.items()}
        | dict(layer.named_buffers())
    )


if __name__ == "__main__":
    sys.exit(main())
