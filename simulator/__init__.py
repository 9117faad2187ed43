"""Replays traces on a virtual clock under other policies, and picks one."""
