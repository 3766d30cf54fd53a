"""Real text to measure on: LongBench, BABILong, Spec-Bench, the user's own; read and scored."""
