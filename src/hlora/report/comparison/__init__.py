"""The report of a comparison: tests, tables, figures, page."""
