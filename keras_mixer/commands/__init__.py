"""The commands: from flags to one call."""
