"""Float models, from a timm name or a checkpoint."""
