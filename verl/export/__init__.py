"""Export: a training checkpoint as a Hugging Face folder."""
