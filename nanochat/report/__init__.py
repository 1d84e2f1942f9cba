"""The report: what stages have recorded -> report.md, plots, a summary. Nothing is computed anew."""
