"""The report: metrics to JSON, JSON to one self-contained HTML file."""
