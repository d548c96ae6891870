"""Checkpoints written by the methods' authors, read without executing anything in them."""
