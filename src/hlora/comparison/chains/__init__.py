"""`hlora compare` with `domains`: methods × orders × seeds, each learning one domain after another."""
