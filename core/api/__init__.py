"""All that a plugin may import: types, hooks, seams, errors, configuration, and the homes of what plugins share."""
