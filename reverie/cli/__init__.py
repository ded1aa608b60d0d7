"""The command line: one file a command, imported when it is called; `main.py` has the group and the errors.

Results go to standard output, progress and notes to standard error; --json prints one object and nothing else.
"""
