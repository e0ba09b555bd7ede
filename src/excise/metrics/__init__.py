"""Names and meaning of the numbers, saved tables, the numbers themselves, readers of other logs."""
