"""Batch audits: images in, a ledger out."""
