"""The paper's mathematics: tensors in, tensors out. Knows no model, file or configuration."""
