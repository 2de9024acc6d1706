"""One process a machine, the agent, is the Ray driver of all ranks there: Ray stays out of the training."""
