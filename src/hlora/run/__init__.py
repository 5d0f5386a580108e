"""What pipeline.py is made of: a job, its phases, how it resumes, its results."""
