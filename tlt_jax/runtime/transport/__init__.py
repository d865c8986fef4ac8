"""What travels between processes of a run, and by which connections."""
