"""Values of a D-dimensional table at continuous coordinates."""

from fastad.ops.grid_interpolate.reference import grid_interpolate, hat_weights

__all__ = ["grid_interpolate", "hat_weights"]
