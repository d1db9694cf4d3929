"""timetrial backends `gloo` and `nccl`: ranks joined by torch.distributed."""
