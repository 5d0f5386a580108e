"""Other ways to forget less, one file for each method. A line in hlora/methods.py adds one.

Each trains on the domain with the same steps, data and order as the others. Learning rate and batches are those of
training.common and training.tune, unless the method documents otherwise. `strength` is what a comparison searches. A
method raises CannotRun if it does not work on the job's model.
"""
