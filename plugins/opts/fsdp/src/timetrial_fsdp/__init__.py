"""timetrial opt `fsdp`: parameters, gradients and optimizer state sharded over ranks."""
