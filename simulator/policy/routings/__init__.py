"""Routings: which experts compute the tokens of a pass, given what the router said of all of them."""
