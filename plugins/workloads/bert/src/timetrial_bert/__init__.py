"""timetrial workload `bert`: BERT masked-LM pre-training (MLPerf Training v1.1)."""
