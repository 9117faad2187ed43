"""Pure functions from records and arrays to data frames and figures, one file per family."""
