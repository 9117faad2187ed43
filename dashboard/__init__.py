"""The dashboard: what was predicted next to what was measured."""
