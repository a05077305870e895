"""Process groups, lost ranks, values exchanged on the host, and graceful stops."""
