"""The engine: schedule, run, verify, commit."""
