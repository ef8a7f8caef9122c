"""Experiments, benchmarks and the fitting of auto-encoders. The product imports nothing from here."""
