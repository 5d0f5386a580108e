"""Text and rows, to train on and to evaluate on."""
