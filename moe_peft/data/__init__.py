"""Tasks, their encoding, and how they are mixed into batches."""
