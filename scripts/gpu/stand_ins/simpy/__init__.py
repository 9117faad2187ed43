"""Stands in for SimPy: what simulator/engine.py needs of it."""

from .events import Environment, Event

__all__ = ["Environment", "Event"]
