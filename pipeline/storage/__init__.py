"""Parquet or JSON lines in, parts and a run directory out. Knows nothing about tokens or models."""
