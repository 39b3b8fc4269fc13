"""Comparisons of methods: what is missing is run, what is finished stays, and all of it becomes one table."""
