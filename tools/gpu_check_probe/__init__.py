"""Two opts for tools/gpu_check.py, which puts them on the path of the runs it starts; never installed."""
