"""Whether the job gets ahead, and whom it waits for."""
