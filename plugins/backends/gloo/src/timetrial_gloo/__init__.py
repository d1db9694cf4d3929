"""timetrial backend `gloo`: ranks on CPUs."""
