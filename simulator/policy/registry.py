"""Names to members, loaded when asked for.

A built-in member is one file in its family's folder; its name is the file's name. Third parties add
members by entry point (group `expertflow.caches`, `expertflow.predictors`, …).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass, field
from typing import Any

from ...tracer.errors import UsageError, unknown_name


@dataclass(slots=True)
class Registry:
    """One family of members. `kind` is the word users read; `package` holds the built-in files."""

    kind: str
    package: str
    group: str
    _classes: dict[str, type[Any]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._built_in(), *self._classes, *self._plugins()})

    def get(self, name: str) -> type[Any]:
        """The member's class. Raises UsageError with the nearest name."""
        if name not in self._classes:
            self._classes[name] = self._load(name)
        return self._classes[name]

    def register(self, name: str, member: type[Any]) -> None:
        """Add a member from Python. Raises UsageError if the name is taken."""
        if name in self.names():
            raise UsageError(f"A {self.kind} named {name!r} exists already; choose another name.")
        self._classes[name] = member

    def unregister(self, name: str) -> None:
        """Take back a member added with `register`."""
        self._classes.pop(name, None)

    def build(self, name: str, params: dict[str, Any]) -> Any:
        """Make an instance. Raises UsageError for parameters it does not take."""
        member = self.get(name)
        try:
            return member(**params)
        except TypeError as cause:
            raise UsageError(
                f"{self.kind} {name!r} cannot take {sorted(params)}: {cause}."
            ) from None

    def _built_in(self) -> dict[str, str]:
        # A trailing underscore in a file's name only keeps it from being a Python keyword or builtin.
        package = importlib.import_module(self.package)
        return {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(package.__path__)}

    def _plugins(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {ep.name: ep for ep in importlib.metadata.entry_points(group=self.group)}

    def _load(self, name: str) -> type[Any]:
        if name not in self.names():
            raise unknown_name(self.kind, name, self.names())
        # What we ship keeps its name, whatever a plugin calls itself.
        if name in self._built_in():
            module = importlib.import_module(f"{self.package}.{self._built_in()[name]}")
            return module.MEMBER
        plugin = self._plugins()[name]
        try:
            return plugin.load()
        except Exception as cause:
            raise UsageError(
                f"{self.kind} {name!r} comes from {plugin.value!r}, which cannot be loaded: {cause}. Mend or "
                "uninstall that package."
            ) from None


_HERE = __name__.rpartition(".")[0]
caches = Registry("cache", f"{_HERE}.caches", "expertflow.caches")
predictors = Registry("predictor", f"{_HERE}.predictors", "expertflow.predictors")
schedulers = Registry("scheduler", f"{_HERE}.schedulers", "expertflow.schedulers")
allocations = Registry("allocation", f"{_HERE}.allocations", "expertflow.allocations")
misses = Registry("misses", f"{_HERE}.misses", "expertflow.misses")
routings = Registry("routing", f"{_HERE}.routings", "expertflow.routings")
FAMILIES = (caches, allocations, predictors, schedulers, misses, routings)
