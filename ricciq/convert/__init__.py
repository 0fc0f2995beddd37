"""From a float model to a discrete one: trace, plan, widths, rewrite."""
