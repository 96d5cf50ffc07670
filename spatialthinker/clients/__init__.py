"""Clients of model APIs: requests, retries, providers, prices."""
