"""timetrial workload: ResNet image classification (MLPerf Training v1.1)."""
