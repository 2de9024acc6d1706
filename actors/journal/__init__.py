"""The journal: what was sent, on disk before it is acknowledged, and read back."""
