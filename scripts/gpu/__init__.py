"""What `make gpu` runs, in parts. docs/gpu.md tells the whole."""
