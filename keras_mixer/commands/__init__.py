"""The commands of the command line, a function of parsed flags each."""
