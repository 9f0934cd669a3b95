"""The verbs of the command line: what each does, and the flags it takes."""
