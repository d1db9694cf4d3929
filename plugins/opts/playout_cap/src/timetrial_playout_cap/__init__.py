"""The opt `playout_cap`; see README.md."""
