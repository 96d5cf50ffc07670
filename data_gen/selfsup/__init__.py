"""Rows that make themselves: questions on plain pictures whose answers follow from how the picture was changed."""
