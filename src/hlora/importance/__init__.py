"""Importance: recorded (ω), kept (Ω), and held by a penalty."""
