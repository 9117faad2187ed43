"""Measuring one machine for itself: copies, expert kernels, read-back and launches, kept as a file with a name."""
