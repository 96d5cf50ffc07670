"""Configuration: records, checks, old keys, loading, help."""
