"""Options: dataclass fields that are flags, and the Config of a run."""
