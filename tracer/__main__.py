"""Lets `python -m expertflow.tracer` stand for the command `expertflow-trace`."""

from .main import main

if __name__ == "__main__":
    main()
