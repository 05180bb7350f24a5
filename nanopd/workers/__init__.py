"""Worker processes as the parent sees them."""
