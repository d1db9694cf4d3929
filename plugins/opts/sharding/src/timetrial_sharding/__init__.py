"""timetrial opts `fsdp` and `tensor_parallel`: a model that is split over ranks."""
