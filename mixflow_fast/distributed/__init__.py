"""Process groups, lost ranks, agreement between hosts, and graceful stops."""
