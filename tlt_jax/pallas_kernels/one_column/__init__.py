"""A weight times one column on GPUs, see `api`."""
