"""The decision core: what to keep, load, evict and prefetch. Pure: no torch, no clock, no I/O.

The simulator and the runtime run the very objects defined here (docs/adr/0001).
"""
