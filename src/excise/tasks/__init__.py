"""Records to tensors, one module per kind of task."""
