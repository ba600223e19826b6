"""Estimators: functions that look at this call's q and k and select the blocks to compute.

A file for each idea; the contract that all of them share is in `contract`.
"""

from accel.estimators.antidiagonal import Antidiagonal
from accel.estimators.columns import ColumnMass
from accel.estimators.connectivity import Connectivity
from accel.estimators.contract import (
    ESTIMATORS,
    Call,
    Estimator,
    Selection,
    estimator_from_dict,
)
from accel.estimators.joined import Joined
from accel.estimators.mass import AdaptiveBlockMass, BlockMassTopK
from accel.estimators.pooled import Pooled, PooledMass
from accel.estimators.residual import Residual
from accel.estimators.sub_block import SubBlock
from accel.estimators.threshold import Threshold

__all__ = [
    "ESTIMATORS",
    "AdaptiveBlockMass",
    "Antidiagonal",
    "BlockMassTopK",
    "Call",
    "ColumnMass",
    "Connectivity",
    "Estimator",
    "Joined",
    "Pooled",
    "PooledMass",
    "Residual",
    "Selection",
    "SubBlock",
    "Threshold",
    "estimator_from_dict",
]
