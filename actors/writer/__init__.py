"""The actor, who its ranks are, and how its run ends."""
