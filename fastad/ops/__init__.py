"""Custom operators: one folder each, judged by its float64 reference."""

# Tests, ahead-of-time checks and bench find the operators' ``cases`` modules here.
OPS = (
    "anomaly_map",
    "grid_interpolate",
    "neighbor_attention",
    "postprocess",
    "preprocess",
)
