"""The registry of passes after which a network no longer is the architecture that it was made as: it is exported, not saved."""

from __future__ import annotations

from passes.drop_identities import DropIdentities
from passes.fold_batch_norm import FoldBatchNorm
from passes.fuse_linear_runs import FuseLinearRuns
from passes.merge_pointwise import MergePointwise
from passes.pipeline import Pass

__all__ = ["CLEANUP_PASSES", "DropIdentities", "FoldBatchNorm", "FuseLinearRuns", "MergePointwise"]

CLEANUP_PASSES: tuple[type[Pass], ...] = (FuseLinearRuns, FoldBatchNorm, MergePointwise, DropIdentities)
