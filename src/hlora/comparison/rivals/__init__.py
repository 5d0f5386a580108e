"""Other ways to forget less, one method a file: each trains on the domain with the budget, data and order of the rest.

Every method is `method(job, strength) -> (tuned model, losses)`, where `strength` is what a grid searches, and raises
CannotRun when it does not work on the job's model. Learning rate, steps and batches are those of training.common and
training.tune, unless the method says otherwise."""
