"""The workload `maskrcnn`; see README.md."""
