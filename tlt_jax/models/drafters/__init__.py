"""The drafter: its network, its files, the layouts others publish."""
