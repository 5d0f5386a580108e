"""hlora in frameworks that build the trainer themselves, a file each."""
