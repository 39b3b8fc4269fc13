"""A run as a page that one can look at, and several runs side by side."""
