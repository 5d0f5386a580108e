"""The one place that trains, and its checkpoints."""
