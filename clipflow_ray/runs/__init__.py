"""A run: one output folder, who may write to it, and what it records."""
