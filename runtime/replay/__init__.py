"""Routing replay: a model of real size with random weights, driven by routing that was recorded elsewhere.

Times and bytes are then real though the text is not. Results say "routing replay, random weights".
"""
