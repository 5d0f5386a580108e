"""The ground: errors, files, locks, redaction. Imports nothing else of hlora."""
