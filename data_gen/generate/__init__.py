"""Generation: a source through rules, live requests or batches, one journal line an image."""
