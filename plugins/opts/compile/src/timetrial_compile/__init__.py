"""timetrial opt `compile`: the model through torch.compile."""
