"""Batch Renormalization (Ioffe 2017) for PyTorch: a drop-in replacement for BatchNorm."""

from .backends import available_backends, use_backend
from .convert import convert_batchnorm, convert_sync, revert_to_batchnorm
from .functional import batch_renorm
from .fuse import FusionReport, FusionRow, fuse, fusion_report, unfuse
from .modules import BatchRenorm, BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .monitor import ClipMonitor
from .population import update_stats
from .recompute import recompute_activations
from .schedule import ClipSchedule

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ClipMonitor",
    "ClipSchedule",
    "FusionReport",
    "FusionRow",
    "available_backends",
    "batch_renorm",
    "convert_batchnorm",
    "convert_sync",
    "fuse",
    "fusion_report",
    "recompute_activations",
    "revert_to_batchnorm",
    "unfuse",
    "update_stats",
    "use_backend",
]
