"""The detector itself, in plain torch: importable on a laptop without Ray."""
