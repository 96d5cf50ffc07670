"""Questions: prompts, templates, drafts and their checks, and the rows between the stages."""
