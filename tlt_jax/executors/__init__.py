"""Who starts the processes of a run, and starts them again: this machine, or Ray."""
