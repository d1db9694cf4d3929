"""timetrial opt `activation_checkpointing`: activations recomputed in the backward pass."""
