"""timetrial: training workloads raced against the clock. `core` is the small part that every plugin builds on."""

__version__ = "0.2.0"

INTERFACE = 2
"""Version of the plugin interface (`core.api`); a plugin states the one it was built for."""
