"""Runner scripts, one per system compared; each is started by its own interpreter."""
