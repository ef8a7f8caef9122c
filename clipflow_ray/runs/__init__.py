"""A run: its output folder, the lease of its writer, and its record."""
