"""The actor: what Ray calls, what it recovers, how its run ends."""
