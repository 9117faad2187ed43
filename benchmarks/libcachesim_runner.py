"""Runs libCacheSim in a process of its own: jobs as JSON lines on stdin, answers as JSON lines on stdout.

The wheel is GPL-3.0: nothing of the toolkit imports it, and this file is only ever started as a child by
oracle.py and replay_speed.py. A job is {"path", "policy", "slots"}; the trace is in the 24-byte oracleGeneral
format. The answer is {"hits", "requests", "cpu_s"}; the time is that of the replay alone.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any


def main() -> None:
    """Answer every job."""
    libcachesim: Any = import_module("libcachesim")

    kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
    for line in sys.stdin:
        job = json.loads(line)
        sized = libcachesim.ReaderInitParam(ignore_obj_size=False)
        reader = libcachesim.TraceReader(job["path"], kind, sized)
        # The default table of 2^24 buckets is made for the web; there are a few thousand experts.
        cache = getattr(libcachesim, job["policy"])(job["slots"], hashpower=12)
        requests = reader.get_num_of_req()
        began = time.process_time()
        miss_ratio, _ = cache.process_trace(reader)
        cpu_s = time.process_time() - began
        hits = (1.0 - miss_ratio) * requests
        if abs(hits - round(hits)) > 0.01:
            raise SystemExit(f"{job}: {hits} hits of {requests} is not a whole number")
        answer = {"hits": round(hits), "requests": requests, "cpu_s": cpu_s}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
