"""timetrial opt `grad_accumulation`: a step in several smaller forward and backward passes."""
