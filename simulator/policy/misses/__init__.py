"""What is done about a miss: one file per answer, named for it."""
