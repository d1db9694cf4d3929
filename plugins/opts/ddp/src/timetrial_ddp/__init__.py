"""timetrial opt `ddp`: gradients averaged over data ranks by DistributedDataParallel."""
