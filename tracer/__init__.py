"""Records real runs of mixture-of-experts models, and owns the vocabulary the rest shares."""
