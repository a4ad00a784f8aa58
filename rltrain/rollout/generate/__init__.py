"""From prompts to graded samples."""
