"""What a user does with a tuned model: merge it, talk to it, push it to the hub."""
