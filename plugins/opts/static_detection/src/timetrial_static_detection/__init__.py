"""The opt `static_detection`; see README.md."""
