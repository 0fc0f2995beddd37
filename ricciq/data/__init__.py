"""Images in any form, as batches."""
