"""What people read: pages, figures, tables. Loads no model."""
