"""How fast a large trace is read, and what it takes on disk.

    python benchmarks/trace_reading.py [--layout decode,batched,prefill] [--quick] [--json] [--keep FOLDER]

Writes a synthetic trace of a million tokens, 16 layers, top-8 of 64 with the toolkit's own writer into a temporary
folder, expert ids only (no gate weights, no token ids), and reads it back as arrays, hashes and page checksums
verified. Bars: 3 s for all of it, and 1.5 bytes on disk per token, layer and chosen expert.

decode   one token per step, as imported routing: rows by (step, layer)
batched  32 sequences that decode together: rows by (step, layer, sequence)
prefill  one step per sequence of 2,048 tokens: rows by (step, layer, position)

Ids are drawn with skew and no order in time, so they pack worse than a model's. Reading is the best of five with a
warm file cache; judged is the CPU time of all threads together, which others on the machine disturb least and which
bounds the wall-clock time of a quiet one from above. `info` is the CPU time of one `routing_stats`, reading included:
it looks at a sample of a trace this large.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.append(str(Path(__file__).resolve().parent))
import bench_common as common
from bench_common import Report, Table, shape_of
from expertflow.tracer.probe import provenance
from expertflow.tracer.schema import table_schemas
from expertflow.tracer.stats import routing_stats
from expertflow.tracer.store import Trace
from expertflow.tracer.types import HardwareProfile, LinkProfile, RunSettings
from expertflow.tracer.writer import TraceWriter

READ_BAR_S, BYTES_BAR = 3.0, 1.5
TOKENS, QUICK_TOKENS = 1_000_000, 4096
LAYERS, EXPERTS, TOP_K = 16, 64, 8
LAYOUTS = {"decode": (1, 1), "batched": (32, 1), "prefill": (1, 2048)}
"""Sequences per step, and tokens of each."""
BLOCK_TOKENS = 32_768
PART_ROWS = 1 << 20
REPEATS = 5


def main() -> None:
    """Measure every layout that was asked for."""
    made = common.parser(__doc__)
    made.add_argument("--layout", default=",".join(LAYOUTS), help="layouts, by commas")
    made.add_argument("--keep", type=Path, help="write the traces here and keep them")
    options = common.options_of(made)
    asked = [name.strip() for name in options.layout.split(",")]
    if unknown := set(asked) - set(LAYOUTS):
        made.error(f"no layout {', '.join(sorted(unknown))}; choose from {', '.join(LAYOUTS)}.")
    if options.write:
        made.error("--write fills no page: this table goes to the terminal, or to JSON.")
    report = Report("trace_reading.py", options)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="expertflow-bench-"))
    try:
        measure(report, folder, asked, QUICK_TOKENS if options.quick else TOKENS)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    report.finish()


def measure(report: Report, folder: Path, layouts: list[str], tokens: int) -> None:
    """Write and read one trace per layout."""
    rows: list[list[object]] = []
    for layout in layouts:
        out = folder / layout
        written_s = write(out, tokens, *LAYOUTS[layout])
        read_s, wall_s = (min(times) for times in zip(*_readings(out), strict=True))
        trace = Trace.open(out)
        size = sum(file.bytes for file in trace.manifest.tables["routing"])
        choices = trace.manifest.rows("routing") * TOP_K
        began = time.process_time()
        routing_stats(trace)
        info_s = time.process_time() - began
        per_choice = size / choices
        rows.append(
            [
                layout,
                f"{choices:,}",
                f"{size / 1e6:.1f}",
                f"{per_choice:.3f}",
                f"{written_s:.2f}",
                f"{read_s:.2f}",
                f"{wall_s:.2f}",
                f"{info_s:.2f}",
            ]
        )
        report.bar(f"{layout}: read", read_s, READ_BAR_S, "s", at_least=False)
        report.bar(
            f"{layout}: on disk",
            per_choice,
            BYTES_BAR,
            "bytes per choice",
            at_least=False,
            always=True,
        )
    head = (
        "layout",
        "choices",
        "MB on disk",
        "bytes per choice",
        "write s",
        "read s (CPU)",
        "read s (wall)",
        "info s (CPU)",
    )
    title = f"{tokens:,} tokens, {LAYERS} layers, top-{TOP_K} of {EXPERTS} (synthetic ids)."
    report.table(Table(title, head, rows))


def _readings(path: Path) -> Iterator[tuple[float, float]]:
    """CPU and wall-clock seconds to open a trace and have its routing as arrays, several times."""
    for _ in range(REPEATS):
        cpu, wall = time.process_time(), time.perf_counter()
        rows = Trace.open(path).routing_arrays()
        yield time.process_time() - cpu, time.perf_counter() - wall
        if rows.experts.shape[1] != TOP_K:
            raise SystemExit(f"{path}: {rows.experts.shape[1]} experts per row instead of {TOP_K}.")


def write(out: Path, tokens: int, batch: int, width: int) -> float:
    """Write the trace and return the seconds spent in the writer, drawing left out."""
    shape = shape_of(LAYERS, EXPERTS, TOP_K)
    recorded = ["routing"]
    schema = table_schemas(shape, recorded)
    writer = TraceWriter(
        out,
        shape=shape,
        hardware=_no_hardware(),
        run=RunSettings(
            batch_size=batch,
            max_new_tokens=0,
            residency="resident",
            experts_implementation="none",
        ),
        provenance=provenance(0, "imported", notes=("Synthetic ids; no model was run.",)),
        recorded=recorded,
        part_rows=PART_ROWS,
    )
    spent_s = 0.0
    with writer:
        last = 0
        for first, ids in _blocks(tokens, batch * width):
            rows = _rows(first, ids, batch, width, schema["routing"])
            last = int(rows["sequence"].to_numpy().max())
            began = time.perf_counter()
            writer.append("routing", rows)
            spent_s += time.perf_counter() - began
        began = time.perf_counter()
        writer.append("sequences", _sequences(last + 1, schema["sequences"]))
        writer.close(warnings=["Synthetic ids; for benchmarks only."])
        spent_s += time.perf_counter() - began
    return spent_s


def _blocks(tokens: int, step_tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first token and ids [tokens, layers, top_k] of each block of whole steps."""
    rng = np.random.default_rng(0)
    popularity = rng.normal(size=(LAYERS, EXPERTS)).astype(np.float32)
    size = max(1, BLOCK_TOKENS // step_tokens) * step_tokens
    for first in range(0, tokens - tokens % step_tokens, size):
        count = min(size, tokens - tokens % step_tokens - first)
        score = popularity - np.log(
            rng.standard_exponential((count, LAYERS, EXPERTS), np.float32) + 1e-9
        )
        yield first, np.argpartition(-score, TOP_K, axis=-1)[..., :TOP_K].astype(np.uint16)


def _rows(first: int, ids: np.ndarray, batch: int, width: int, schema: pa.Schema) -> pa.Table:
    """Rows by (step, layer, sequence, position); sequences are 2,048 tokens long."""
    steps = len(ids) // (batch * width)
    by_layer = ids.reshape(steps, batch * width, LAYERS, TOP_K).swapaxes(1, 2)
    token = first + np.arange(len(ids)).reshape(steps, 1, batch, width)
    step = token // (batch * width)
    if width == 1:
        member = np.arange(batch)[:, None]
        sequence, position = step // 2048 * batch + member, step % 2048 + 0 * member
    else:
        sequence, position = step + 0 * token, np.arange(width) + 0 * token
    spread = (steps, LAYERS, batch, width)

    def column(values: np.ndarray, kind: type[np.generic]) -> np.ndarray:
        return np.broadcast_to(values, spread).reshape(-1).astype(kind)

    rows = len(ids) * LAYERS
    layer = np.arange(LAYERS).reshape(1, LAYERS, 1, 1)
    flat = pa.array(np.ascontiguousarray(by_layer).reshape(-1))
    columns = {
        "step": column(step, np.int32),
        "layer": column(layer, np.int16),
        "sequence": column(sequence, np.int32),
        "position": column(position, np.int32),
        "phase": _label("prefill" if width > 1 else "decode", rows),
        "token_id": np.full(rows, -1, np.int32),
        "modality": _label("text", rows),
        "experts": pa.FixedSizeListArray.from_arrays(flat, TOP_K),
    }
    return pa.table(columns, schema=schema)


def _sequences(count: int, schema: pa.Schema) -> pa.Table:
    number = np.arange(count, dtype=np.int32)
    columns = {
        "sequence": number,
        "prompt_id": [str(n) for n in number],
        "domain": [""] * count,
        "batch": number,
        "prompt_tokens": np.zeros(count, np.int32),
        "generated_tokens": np.zeros(count, np.int32),
        "finish": _label("unknown", count),
        "ttft_s": np.full(count, np.nan),
        "prompt_sha256": [""] * count,
        "prompt_text": pa.nulls(count, pa.string()),
        "output_ids": pa.nulls(count, pa.list_(pa.int32())),
    }
    return pa.table(columns, schema=schema)


def _label(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([text]))


def _no_hardware() -> HardwareProfile:
    return HardwareProfile(
        name="not recorded",
        device="none",
        device_bytes=0,
        host_bytes=0,
        threads=0,
        link=LinkProfile(name="not recorded", origin="declared", curves=()),
        origin="declared",
    )


if __name__ == "__main__":
    main()
