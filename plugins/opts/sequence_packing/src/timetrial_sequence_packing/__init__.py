"""timetrial opt `sequence_packing`: several sequences in one row."""
