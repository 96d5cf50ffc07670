"""Curation: validation by another model, filters, quotas, splits and tables."""
