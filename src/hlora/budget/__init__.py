"""A forgetting budget in place of φ."""
