"""What the measurements share: how they report, load over time, rows of served requests, figures."""
