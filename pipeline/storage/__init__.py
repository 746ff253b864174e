"""Run directories, parts, locks and object stores. Knows nothing about prompts or models."""
