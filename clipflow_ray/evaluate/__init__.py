"""Measuring a checkpoint on labelled images, beside its baselines."""
