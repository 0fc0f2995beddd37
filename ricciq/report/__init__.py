"""The results of a run for people: report, pages, plots and tables."""
