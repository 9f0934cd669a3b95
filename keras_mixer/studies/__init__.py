"""Looking at several runs together."""
