"""Accuracies, clean and under attack: measured, stored, verified."""
