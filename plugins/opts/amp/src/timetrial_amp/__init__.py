"""timetrial opt `amp`: bfloat16 autocast."""
