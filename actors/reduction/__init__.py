"""From a run's entries to rows: over ranks, step by step."""
