"""Accuracy under attack and under corruption, with beta chosen on validation images."""
