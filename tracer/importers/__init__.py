"""Other people's recordings as traces: one file per format."""
