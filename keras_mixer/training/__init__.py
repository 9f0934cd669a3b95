"""From a Config to a run directory."""
