"""Custom operators: one folder each, judged by its float64 reference."""
