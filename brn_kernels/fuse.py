"""``fuse``: each norm of a model in one call with the activation, and the residual, that follow it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .convert import (
    FUSED_BATCHNORM,
    FUSES_ACTIVATION,
    batchnorm_of,
    fusible_activation,
    renorm_of,
    renorm_type,
    replace_layers,
)
from .functional import check_eps
from .fused_call import activation_name, is_untouched
from .fused_class import original_class, restore_classes
from .fusion_graph import Site, activation_of
from .fusion_sites import Sites
from .modules import BatchRenorm
from .schedule import ClipSchedule

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class FusionRow:
    """One norm of a model: fused, or why not (``reason`` is empty if it is fused)."""

    norm: str
    kind: str
    activation: str
    owner: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """Every norm of a model, once; ``str()`` of it is a table."""

    fused: tuple[FusionRow, ...]
    left: tuple[FusionRow, ...]

    def counts(self) -> dict[str, int]:
        """How many norms are fused, by kind: "norm + act", "norm + add + act", "norm + add"."""
        return dict(Counter(row.kind for row in self.fused))

    def __str__(self) -> str:
        rows = [("norm", "fused as", "activation", "in the forward of", "left, why")]
        for row in (*self.fused, *self.left):
            owner = "" if row.reason else row.owner or "(the model)"
            rows.append((row.norm or "(the model)", row.kind, row.activation, owner, row.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts().items()))
        return "\n".join([*lines, f"{len(self.fused)} fused ({kinds or 'none'}), {len(self.left)} left"])


def fuse(model: _Model) -> _Model:
    """Compute each norm together with the activation, or the addition and the activation, after it; in place.

    A *site* is a BatchNorm or Batch Renormalization layer, an optional addition of a residual and one of ReLU,
    leaky ReLU (slope 0.01), SiLU and hardswish (after an addition: ReLU, or nothing), called by the forward of one
    module; the norm may be the last layer of a branch. The forward of that module is replaced (its class becomes a
    subclass of what it was), its children stay: names, ``state_dict`` keys, parameters and hooks are as before.
    A BatchNorm of a site becomes Batch Renormalization with closed limits, which is BatchNorm. Outputs, gradients
    and statistics are those of the model before.

    Where a call cannot be fused when it comes (a hook on a layer, another activation put in place, a residual that
    broadcasts, an attribute changed that the forward depends on), what is computed is what was before. After
    replacing modules by others, call ``fuse`` again. Fuse before ``torch.compile`` and before DDP.

    Args:
        model: any module; if it is itself a norm, use what is returned.

    Returns:
        ``model``, or the new layer if ``model`` is one.
    """
    sites = Sites(model, _why_not)
    found = [site for site in sites.fused() if not _is_compiled(sites, site)]
    by_itself = [norm for norm in sites.norms if _activates_by_itself(norm) and norm not in sites.compiled]
    norms = {site.norm for site in found} | set(by_itself)
    for norm in by_itself:
        if isinstance(norm, BatchRenorm):
            norm.__dict__[FUSES_ACTIVATION] = True
    for owner in sites.owners.values():
        if owner.module not in sites.compiled:
            owner.module.__class__ = owner.fused or original_class(owner.module)

    def replaced(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, BatchRenorm):
            return batchnorm_of(layer) if _was_batchnorm(layer) and layer not in norms else None
        if not isinstance(layer, _BatchNorm) or layer not in norms:
            return None
        new_type = renorm_type(layer)
        assert new_type is not None
        new = renorm_of(layer, new_type, ClipSchedule.batchnorm(), layer.momentum)
        new.__dict__[FUSED_BATCHNORM] = True
        if layer in by_itself:
            new.__dict__[FUSES_ACTIVATION] = True
        return new

    return replace_layers(model, replaced)


def unfuse(model: _Model) -> _Model:
    """Undo :func:`fuse`, in place: the classes of before, and BatchNorm where BatchNorm was.

    Args:
        model: any module; if it is itself a norm, use what is returned.

    Returns:
        ``model``, or the new layer if ``model`` is one.
    """
    restore_classes(model)
    for layer in model.modules():
        layer.__dict__.pop(FUSES_ACTIVATION, None)
    return replace_layers(
        model, lambda layer: batchnorm_of(layer) if isinstance(layer, BatchRenorm) and _was_batchnorm(layer) else None
    )


def fusion_report(model: nn.Module) -> FusionReport:
    """What :func:`fuse` has fused in ``model`` and what it has left, and why: every norm once.

    Args:
        model: any module, fused or not.
    """
    sites = Sites(model, _why_not)
    fused: dict[nn.Module, FusionRow] = {}
    waiting: dict[nn.Module, str] = {}
    for site in sites.fused():
        if not _is_in_place(site):
            waiting.setdefault(site.norm, "compiled as it is" if _is_compiled(sites, site) else "fuse it by brn.fuse")
        elif site.norm not in fused:
            name = "" if site.activation is None else activation_of(site.owners[0], site.activation) or ""
            fused[site.norm] = FusionRow(sites.norms[site.norm], site.kind, name, site.owners[0].name, "")
    for norm, name in sites.norms.items():
        if _activates_by_itself(norm):
            if norm.__dict__.get(FUSES_ACTIVATION):
                fused[norm] = FusionRow(name, "norm + act", fusible_activation(norm) or "", name, "")
            else:
                waiting[norm] = "compiled as it is" if norm in sites.compiled else "fuse it by brn.fuse"
    left = [
        FusionRow(name, "", "", "", waiting.get(norm) or sites.why_left(norm))
        for norm, name in sites.norms.items()
        if norm not in fused
    ]
    return FusionReport(tuple(fused[norm] for norm in sites.norms if norm in fused), tuple(left))


def _why_not(module: nn.Module) -> str | None:
    """Why a module cannot be the norm of a site; "" if it can, None if it is no norm."""
    if not isinstance(module, (BatchRenorm, _BatchNorm)):
        return None
    if _is_lazy(module):
        return "is lazy: run a batch through the model first"
    if isinstance(module, BatchRenorm):
        if module.ends_with_normalization():
            return ""
        if module.activation is not None:
            return "has an activation of its own"
    elif renorm_type(module) is None:
        return f"a subclass of BatchNorm not known here: {type(module).__name__}"
    elif getattr(module, "activation", None) is not None:
        return "has an activation of its own"
    else:
        try:
            check_eps(module.eps)
        except ValueError as error:
            return str(error)
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        if type(drop) is not nn.Identity:
            return f"followed by its own {type(drop).__name__}"
        if not isinstance(act, nn.Identity):
            return f"followed by its own {type(act).__name__}"
        return "" if is_untouched(drop) and is_untouched(act) else "its drop or act has hooks"
    return (
        f"a subclass of BatchRenorm not known here: {type(module).__name__}" if isinstance(module, BatchRenorm) else ""
    )


def _activates_by_itself(norm: nn.Module) -> bool:
    """Whether the layer is one of timm's, or made from one, with an activation that can be fused."""
    if not isinstance(getattr(norm, "act", None), nn.Module) or not isinstance(getattr(norm, "drop", None), nn.Module):
        return False
    if isinstance(norm, _BatchNorm) and (renorm_type(norm) is None or "forward" in vars(norm)):
        return False
    return getattr(norm, "activation", None) is None and activation_name(norm.act) is not None and (  # type: ignore[arg-type]
        fusible_activation(norm) is not None
    )  # fmt: skip


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin)


def _was_batchnorm(layer: BatchRenorm) -> bool:
    return bool(layer.__dict__.get(FUSED_BATCHNORM, False))


def _is_compiled(sites: Sites, site: Site) -> bool:
    return site.norm in sites.compiled or any(owner.module in sites.compiled for owner in site.owners)


def _is_in_place(site: Site) -> bool:
    """Whether the model has been fused here already."""
    return isinstance(site.norm, BatchRenorm) and all(
        owner.fused is None or type(owner.module) is owner.fused for owner in site.owners
    )
