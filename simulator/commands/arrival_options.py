"""What the options of a command say about requests that arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..arrivals import Arrivals as Found
    from ..policy.spec import PolicySpec
    from ..serving import Serving, ServingSettings
    from ..workload import Workload

Arrivals = Annotated[
    str | None,
    typer.Option(
        help="Run requests as they arrive, in continuous batches: poisson:RATE (per second), every:SECONDS, "
        "closed:USERS, an Azure .csv, a Mooncake .jsonl, or a .jsonl of prompts with `arrival_s` (or .gz of them). "
        "Default: batches as recorded, or as given."
    ),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(help="Requests in progress at most; default: the batch size, or all USERS."),
]
Requests = Annotated[
    int | None,
    typer.Option(
        help="Requests to run; default: as many as there are recorded sequences, or prompts."
    ),
]
ArrivalSpeed = Annotated[
    float | None, typer.Option(help="Arrivals come so many times as fast; default: 1.")
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Lengths of requests: trace (default; deploy, verify: those of the prompts and --max-new-tokens), or "
        "arrivals (recorded routing, or prompts, are cut or repeated)."
    ),
]
Prefill = Annotated[
    str | None, typer.Option(help="Prompts share passes (mixed, the default) or go first (first).")
]
MaxStepTokens = Annotated[
    int | None,
    typer.Option(help="Tokens that one pass takes at most, prompts and generated; default: 2048."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of poisson arrivals; default: 0.")]
StopAtEos = Annotated[
    bool,
    typer.Option(
        "--stop-at-eos",
        help="With --arrivals: end a request at an end mark, and not only at its length.",
    ),
]


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
    max_step_tokens: int | None = None

    @property
    def are_given(self) -> bool:
        """Whether requests arrive. Raises UsageError for options that are about nothing then."""
        from dataclasses import fields

        from ...tracer.errors import UsageError

        if self.arrivals is not None:
            return True
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise UsageError(f"{option} is about requests that arrive; add --arrivals.")
        return False

    @property
    def speed(self) -> float:
        """How many times as fast arrivals come."""
        return 1.0 if self.arrival_speed is None else self.arrival_speed

    def read(self, sequences: int) -> Found:
        """The arrivals, of as many requests as there are sequences unless said. Raises UsageError, InputError."""
        from ..arrivals import read_arrivals

        assert self.arrivals is not None
        return read_arrivals(
            self.arrivals,
            limit=sequences if self.requests is None else self.requests,
            seed=self.seed or 0,
            speed=self.speed,
        )

    def settings(self, arrivals: Found, batch_size: int) -> ServingSettings:
        """How they are batched: all users of a closed loop, else `batch_size`, unless said. Raises UsageError."""
        from ...tracer.errors import unknown_name
        from ..serving import MAX_STEP_TOKENS, ServingSettings

        if self.prefill not in (None, "mixed", "first"):
            raise unknown_name("way to run prompts (--prefill)", self.prefill, ("mixed", "first"))
        usual = arrivals.users or batch_size
        max_batch = usual if self.max_batch is None else self.max_batch
        most = max(MAX_STEP_TOKENS, max_batch)
        return ServingSettings(
            max_batch=max_batch,
            max_step_tokens=most if self.max_step_tokens is None else self.max_step_tokens,
            mixed=self.prefill != "first",
            lengths=self.lengths or "trace",
        )

    def serving(self, workload: Workload, spec: PolicySpec) -> Serving | None:
        """Requests with the workload's routing; None without --arrivals. Raises UsageError, InputError."""
        from ..serving import serve
        from ..token_table import TokenTable

        if not self.are_given:
            return None
        table = TokenTable.of(workload)
        found = self.read(table.num_sequences)
        return serve(table, spec, found, self.settings(found, workload.batch_size))
