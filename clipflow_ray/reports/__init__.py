"""Shared parts of the HTML reports."""
