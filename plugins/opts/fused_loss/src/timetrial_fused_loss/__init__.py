"""timetrial opt `fused_loss`: vocabulary cross-entropy without all the logits."""
