"""timetrial backend `nccl`: one rank for each NVIDIA GPU."""
