"""What an adversary would do to the result, done to a copy or undone afterwards."""
