"""Code of users and strangers, in processes of its own."""
