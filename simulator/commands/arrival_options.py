"""What the options of a command say about requests that arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..policy.spec import PolicySpec
    from ..serving import Serving
    from ..workload import Workload

Arrivals = Annotated[
    str | None,
    typer.Option(
        help="Run requests as they arrive, in continuous batches: poisson:RATE (per second), every:SECONDS, "
        "closed:USERS, an Azure .csv or a Mooncake .jsonl (or .gz of them). Default: the recorded batches."
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(help="Requests in progress at most; default: the trace's batch, or all USERS."),
]
Requests = Annotated[
    int | None, typer.Option(help="Requests to run; default: as many as the trace has sequences.")
]
ArrivalSpeed = Annotated[
    float | None, typer.Option(help="Arrivals come so many times as fast; default: 1.")
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Lengths of requests: trace (default), or arrivals (recorded routing is cut or repeated)."
    ),
]
Prefill = Annotated[
    str | None, typer.Option(help="Prompts share passes (mixed, the default) or go first (first).")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of poisson arrivals; default: 0.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalOptions:
    """The options as typed; None where not given."""

    arrivals: str | None
    max_batch: int | None
    requests: int | None
    arrival_speed: float | None
    lengths: str | None
    prefill: str | None
    seed: int | None

    def serving(self, workload: Workload, spec: PolicySpec) -> Serving | None:
        """Requests with the workload's routing; None without --arrivals. Raises UsageError, InputError."""
        from dataclasses import fields

        from ...tracer.errors import UsageError, unknown_name
        from ..arrivals import read_arrivals
        from ..serving import MAX_STEP_TOKENS, ServingSettings, serve
        from ..token_table import TokenTable

        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if self.arrivals is None:
            if given:
                option = "--" + given[0].replace("_", "-")
                raise UsageError(f"{option} is about requests that arrive; add --arrivals.")
            return None
        if self.prefill not in (None, "mixed", "first"):
            raise unknown_name("way to run prompts (--prefill)", self.prefill, ("mixed", "first"))
        table = TokenTable.of(workload)
        found = read_arrivals(
            self.arrivals,
            limit=table.num_sequences if self.requests is None else self.requests,
            seed=self.seed or 0,
            speed=1.0 if self.arrival_speed is None else self.arrival_speed,
        )
        usual = found.users or workload.batch_size
        max_batch = usual if self.max_batch is None else self.max_batch
        settings = ServingSettings(
            max_batch=max_batch,
            max_step_tokens=max(MAX_STEP_TOKENS, max_batch),
            mixed=self.prefill != "first",
            lengths=self.lengths or "trace",
        )
        return serve(table, spec, found, settings)
