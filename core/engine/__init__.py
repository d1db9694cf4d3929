"""One rank of a run: it builds the step, runs the timed loop and watches over it."""
