"""What is trained: a backbone, its head and its loss, one file an objective."""
