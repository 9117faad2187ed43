"""Which sequences run together: one file per scheduler, named for it."""
