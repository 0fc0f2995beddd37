"""From a data set in any form to batches of images."""
