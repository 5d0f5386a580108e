"""What is measured before and after."""
