"""Models: loading, tiny random ones, prompts, positions, vision tower, language-model passes over a group layout."""
