"""Go by self-play: the workload `minigo`."""
