"""The workload `rnnt`: speech recognition by an RNN transducer."""
