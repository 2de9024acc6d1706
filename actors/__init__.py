"""What runs in the writer: protocol, settings, the actor, aggregation over ranks, the SwanLab run."""
