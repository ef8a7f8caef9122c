"""Evaluation of a checkpoint and of its baselines on labelled images."""
