"""From a plan to worker processes, and to one exit status."""
