"""Stands in for Rich: plain text, no colours."""
