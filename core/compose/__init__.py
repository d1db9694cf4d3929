"""Installed plugins and a command line become one checked plan. Imports without torch."""
