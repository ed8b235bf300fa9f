"""Hosts and sinks: each module needs its own optional dependency and is imported by itself."""
