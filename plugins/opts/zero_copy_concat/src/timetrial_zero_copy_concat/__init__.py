"""timetrial opt `zero_copy_concat`: producers write into slices of one buffer."""
