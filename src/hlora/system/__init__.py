"""The lowest floor: errors, files, locks, redaction. Imports nothing else from hlora."""
