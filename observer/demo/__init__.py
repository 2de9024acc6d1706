"""``swanlab-ray demo``."""
