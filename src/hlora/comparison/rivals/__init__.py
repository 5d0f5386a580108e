"""Other ways to forget less, one method a file. A line in hlora/methods.py adds one.

Each trains on the domain with the same steps, data and order as the others. Learning rate and batches are those of
training.common and training.tune, unless the method says otherwise. `strength` is what a comparison searches. A method
raises CannotRun when it does not work on the job's model.
"""
