"""timetrial backend `single`: one process without a process group."""
