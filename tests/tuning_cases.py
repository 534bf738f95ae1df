"""Made-up times of kernels, and an empty table: tuning without a GPU."""

from __future__ import annotations

from treespec_compiler.codegen.gpu import tune as tuning
from treespec_compiler.codegen.tables import TuningTable

EMPTY = TuningTable(tuning.OP, "sm_90", "hash", ())


def microseconds(config, shape):
    """The best one has blocks of 32 keys, then the fewest warps and stages."""
    return 10 + abs(config.block_n - 32) + config.num_warps / 10 + config.num_stages / 100 + config.block_m / 1000
