"""Where Ray comes from, and what keeps it from harming its process."""
