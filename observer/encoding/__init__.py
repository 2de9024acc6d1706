"""From values to bytes, on the thread that logs."""
