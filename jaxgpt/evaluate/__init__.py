"""Measuring models: baselines and, later, benchmarks."""
