"""timetrial opt `gradient_compression`: gradients exchanged in fewer bytes."""
