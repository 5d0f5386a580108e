"""What comes before a run: its data as they are trained, and what it will cost."""
