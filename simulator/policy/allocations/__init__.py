"""How slots are divided over layers: one file per allocation, named for it."""
