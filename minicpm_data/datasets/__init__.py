"""Training data: files, forms, examples, batches."""
