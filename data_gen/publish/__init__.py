"""Publication: the data set folder, its card, its upload, and the report page."""
