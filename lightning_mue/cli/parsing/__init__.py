"""How the command line is read: callbacks by name, and errors in one paragraph."""
