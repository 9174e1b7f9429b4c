"""The commands of the shell, `python -m wan_core`: each returns what it has to say."""
