"""timetrial tracker `mlperf`: result_0.txt, the log that MLCommons' checkers read."""
