"""Makes tests/golden/trace-v1 and what is expected of it. Run only when the format changes.

    PYTHONPATH=.typing python tests/make_golden_trace.py

A golden trace of an older version is never made again: that readers still read it is the point.
"""

import hashlib
import json
from pathlib import Path

from expertflow.tracer.store import RoutingArrays, Trace
from expertflow.tracer.synthetic import synthetic_trace

GOLDEN = Path(__file__).parent / "golden"


def digests(arrays: RoutingArrays) -> dict[str, str]:
    named = {
        name: getattr(arrays, name)
        for name in ("step", "layer", "sequence", "position", "phase_is_decode", "token_id")
    }
    named |= {"is_pad": arrays.is_pad, "experts": arrays.experts, "weights": arrays.weights}
    named |= {f"lookahead_{depth}": ids for depth, ids in arrays.lookahead.items()}
    return {
        name: hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        for name, array in named.items()
    }


def expected(trace: Trace) -> dict[str, object]:
    return {
        "trace_id": trace.manifest.trace_id,
        "rows": {name: trace.manifest.rows(name) for name in trace.manifest.tables},
        "arrays": digests(trace.routing_arrays()),
        "sequences": trace.table("sequences", ["sequence", "domain", "ttft_s"]).to_pylist(),
        "first_step": trace.table("steps").slice(0, 1).to_pylist()[0],
    }


def main() -> None:
    trace = synthetic_trace(
        GOLDEN / "trace-v1",
        layers=3,
        experts=8,
        top_k=2,
        sequences=3,
        prompt_tokens=6,
        new_tokens=4,
        batch_size=2,
        seed=1,
        lookahead=2,
        stream=True,
        overwrite=True,
    )
    text = json.dumps(expected(trace), indent=2) + "\n"
    (GOLDEN / "trace-v1.expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
