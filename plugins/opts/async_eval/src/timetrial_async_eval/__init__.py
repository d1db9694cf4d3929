"""The opt `async_eval`; see README.md."""
