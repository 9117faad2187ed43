"""Who is prefetched: one file per predictor, named for it."""
