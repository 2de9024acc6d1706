"""Who is in the run: ranks and their lives, restarts, jobs of a run, clocks."""
