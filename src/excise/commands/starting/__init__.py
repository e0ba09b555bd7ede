"""From a recipe to what a run starts with: rows, terms, model, statistics, start; refused here or not at all."""
