"""What people read of a run: a report, pages, plots, tables."""
