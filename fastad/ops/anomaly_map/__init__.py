"""From distances on a feature grid to an anomaly map and a raw score."""

from fastad.ops.anomaly_map.matrices import bilinear_matrix, gaussian_matrix, mean_pool_matrix

__all__ = ["bilinear_matrix", "gaussian_matrix", "mean_pool_matrix"]
