"""Measuring models, judging them beside the original and the gold, and writing down what was found."""
