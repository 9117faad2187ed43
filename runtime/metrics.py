"""Live counters in Prometheus' text format, and a page of them that only this machine can reach (extra `metrics`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from ..tracer.errors import ResourceError

Stats = Callable[[], Mapping[str, float]]
ADDRESS = "127.0.0.1"
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "hits": ("expert_hits", "Demanded experts that were in their slots."),
    "lates": ("expert_lates", "Demanded experts that were on their way."),
    "misses": ("expert_misses", "Demanded experts that had to be loaded or computed elsewhere."),
    "passes": ("passes", "Forward passes that have ended."),
    "tokens": ("tokens", "Rows of all passes, one token each."),
    "pass_s": ("pass_seconds", "Time that passes took."),
    "stall_s": ("stall_seconds", "Time that passes waited for experts."),
    "bytes_moved": ("link_bytes", "Bytes of experts that crossed the link."),
    "link_busy_s": ("link_busy_seconds", "Time with a copy on the link."),
}
"""Counters by key of the stats: their names and what they count. Rates are left to whoever reads them."""
_MEMORY = ("slot", "weight", "kv_cache", "predictor", "host")


def as_text(stats: Stats) -> str:
    """All counters as text. Raises ResourceError without prometheus_client."""
    library = _library()
    return library.generate_latest(_registry(library, stats)).decode()


def serve(stats: Stats, port: int) -> tuple[int, Callable[[], None]]:
    """Serve them on this machine; returns the port and what ends it. Raises ResourceError."""
    library = _library()
    try:
        server, thread = library.start_http_server(
            port, addr=ADDRESS, registry=_registry(library, stats)
        )
    except (OSError, OverflowError) as cause:
        raise ResourceError(
            f"Metrics cannot be served on {ADDRESS}:{port}: {cause}. Choose another port, or 0 for one that is free."
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop


def _library() -> ModuleType:
    try:
        import prometheus_client
    except ModuleNotFoundError:
        raise ResourceError(
            "Metrics need prometheus_client, which is not installed. Run: pip install 'expertflow-trace[metrics]'"
        ) from None
    return prometheus_client


def _registry(library: ModuleType, stats: Stats) -> Any:
    registry = library.CollectorRegistry()
    registry.register(_Collector(stats))
    return registry


class _Collector:
    """Reads the counters whenever it is asked: nothing is counted twice."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        """What prometheus_client shows."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = self._stats()
        for key, (name, words) in _COUNTERS.items():
            yield CounterMetricFamily(f"expertflow_{name}", words, value=found[key])
        memory = GaugeMetricFamily(
            "expertflow_memory_bytes",
            "Bytes by class: on the device, and packed experts on the host.",
            labels=["class"],
        )
        for kind in _MEMORY:
            memory.add_metric([kind], found[f"{kind}_bytes"])
        yield memory
