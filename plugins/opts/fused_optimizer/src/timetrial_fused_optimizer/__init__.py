"""timetrial opt `fused_optimizer`: multi-tensor, capturable optimizers."""
