"""Scoring: the strict answer rule and the released one."""
