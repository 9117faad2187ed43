"""The compiled engine: the reference engine's meaning as loops over arrays, equal to the last bit.

Numba compiles it on first use and keeps the result on disk. Import `compiled.replay` only where numba is
installed (`forecast` does, and falls back on the reference engine). Experts are numbered layer × num_experts +
expert throughout ("keys").
"""
