"""Who is evicted: one file per cache, named for it."""
