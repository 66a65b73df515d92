"""Questions about pictures from a file, asked by a recipe, scored as published, reported beside published scores."""
