"""timetrial opt `unpad`: no computation on padding."""
