"""timetrial opt `cuda_graphs`: the whole training iteration as one captured graph."""
