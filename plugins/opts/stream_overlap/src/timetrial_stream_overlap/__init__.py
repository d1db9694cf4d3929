"""timetrial opt `stream_overlap`: copies and gradient exchange hidden behind compute."""
