"""timetrial opt `sharp`: SHARP-aware all-reduce: data crosses each link once."""
