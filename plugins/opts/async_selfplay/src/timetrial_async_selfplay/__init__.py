"""The opt `async_selfplay`; see README.md."""
